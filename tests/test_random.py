"""The random numbers of images, samples and slices."""

import threading

import torch

from tests.benchmarks import noise_ahead
from util.random import KNOT_MM, ImageRandom, Place, image_generator, sample_random


def test_random_numbers_belong_to_image_sample_and_seed():
    def draw(*keys):
        return torch.randn(4, generator=image_generator(*keys))

    assert torch.equal(draw("a", 0, 1), draw("a", 0, 1))
    for other in (("b", 0, 1), ("a", 1, 1), ("a", 0, 2), ("a", "measurement", 1), ("a0", "", 1)):
        assert not torch.equal(draw("a", 0, 1), draw(*other))
    pair = ImageRandom([image_generator(n, 0, 0) for n in "ab"])
    together = pair.randn_like(torch.zeros(4, 1, 3, 3))  # two contrasts an image
    alone = ImageRandom([image_generator("b", 0, 0)]).randn_like(torch.zeros(2, 1, 3, 3))
    assert torch.equal(together[2:], alone)


def test_an_odd_sample_mirrors_the_even_one_before_it():
    def draws(names, samples):
        random = sample_random(names, samples, 5)
        return [random.randn_like(torch.zeros(len(names) * len(samples), 1, 3, 3)) for _ in "12"]

    for step, found in enumerate(draws("ab", range(5))):
        a = found[:5]
        assert torch.equal(a[0], -a[1]) and torch.equal(a[2], -a[3])
        assert not torch.equal(a[0].abs(), a[2].abs()) and not torch.equal(a[2].abs(), a[4].abs())
        assert not torch.equal(a[0].abs(), found[5].abs())  # another image
        assert torch.equal(found[8:9], draws("b", [3])[step])  # alone as among others
    plain = ImageRandom([image_generator("a", 0, 5)]).randn_like(torch.zeros(1, 1, 3, 3))
    assert torch.equal(draws("a", [0])[0], plain)


def slice_noise(places, count=1, seed=5, samples=range(1), shape=(1, 64, 64)):
    """`count` draws of the slices' noise, each (rows, 64, 64)."""
    random = sample_random([str(i) for i in range(len(places))], samples, seed, places)
    rows = len(places) * len(samples)
    return [random.randn_like(torch.zeros(rows, *shape))[:, 0] for _ in range(count)]


def test_the_noise_of_slices_is_normal_and_agrees_with_their_neighbours():
    mm = torch.linspace(3, 3 + 3 * KNOT_MM, 25)
    places = [Place("v", float(z)) for z in mm]
    for noise in slice_noise(places, count=2):
        assert noise.mean(dim=(1, 2)).abs().max() < 4.5 / 64
        assert (noise.var(dim=(1, 2)) - 1).abs().max() < 4.5 * 2**0.5 / 64
    found = torch.corrcoef(noise.flatten(1))
    knot, angle = (mm / KNOT_MM).floor(), (mm / KNOT_MM).frac() * torch.pi / 2
    # What two slices share: both of their knots, the one that lies between them, or nothing.
    same = torch.cos(angle[:, None] - angle)
    beside = torch.sin(angle[:, None]) * torch.cos(angle)
    apart = knot - knot[:, None]
    expected = torch.where(apart == 0, same, torch.where(apart == 1, beside, 0.0))
    expected = torch.where(apart == -1, beside.mT, expected)
    assert (found - expected).abs().max() < 4.5 / 64


def test_the_noise_of_a_slice_does_not_depend_on_those_beside_it():
    places = [Place("v", z) for z in (0.0, 7.0, 2 * KNOT_MM + 1)]
    first, second = slice_noise(places, 2, samples=range(3))
    for i, place in enumerate(places):
        for k in range(3):
            alone = slice_noise([place], 2, samples=[k])
            assert torch.equal(alone[0][0], first[3 * i + k])
            assert torch.equal(alone[1][0], second[3 * i + k])
    assert torch.equal(first[0], -first[1])
    beside_a_picture = slice_noise([None, places[1]])[0]
    assert torch.equal(beside_a_picture[1], first[3])
    assert torch.equal(beside_a_picture[0], slice_noise([None])[0][0])
    assert not torch.equal(slice_noise([Place("w", 7.0)])[0][0], first[3])
    assert not torch.equal(slice_noise(places[1:2], seed=6)[0][0], first[3])


def test_numbers_drawn_ahead_are_those_drawn_in_turn():
    """Of whatever shapes and kinds one after the other."""
    shapes = [(4, 1, 3, 3), (4, 1, 3, 3), (2, 1, 5, 5), "poisson", (2, 1, 5, 5), (4, 1, 3, 3)]
    random = ImageRandom([image_generator(n, 0, 0) for n in "ab"], [[(0, 1)], [(1, -1)]])
    plain = [image_generator(n, 0, 0) for n in "ab"]
    for shape in shapes:
        if shape == "poisson":
            rate = torch.full((2, 1, 4, 4), 3.0)
            found = random.poisson(rate)
            both = zip(rate, plain, strict=True)
            expected = [torch.poisson(r[None], generator=g) for r, g in both]
        else:
            found = random.randn_like(torch.empty(shape))
            each = (shape[0] // 2, *shape[1:])
            both = zip((1, -1), plain, strict=True)
            expected = [sign * torch.randn(each, generator=g) for sign, g in both]
        assert torch.equal(found, torch.cat(expected))


def test_the_numbers_of_all_steps_but_the_first_are_drawn_beside_the_network(monkeypatch):
    """Time says little where other work shares the cores; who draws does not depend on it."""
    draw, drawn_by = ImageRandom._draw, []

    def noted(self, shape):
        drawn_by.append(threading.current_thread())
        return draw(self, shape)

    monkeypatch.setattr(ImageRandom, "_draw", noted)
    random = ImageRandom([image_generator("a", 0, 0)])
    for _ in range(5):
        random.randn_like(torch.empty(1, 1, 8, 8))
    random._take_ahead(None)
    assert len(drawn_by) == 6 and drawn_by[0] is threading.main_thread()
    assert threading.main_thread() not in drawn_by[1:]


def test_the_benchmark_of_noise_drawn_ahead_runs(capsys):
    arguments = ["--gpu", "-1", "--size", "32", "--network", "5", "--repeats", "3"]
    assert noise_ahead.main(arguments) == 0
    assert "| ahead, in a thread |" in capsys.readouterr().out
