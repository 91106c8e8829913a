"""Random numbers that belong to an image, not to a run.

A reconstruction's numbers are decided by the image's name, the sample's index and the run's
seed, so batch size, neighbours in the folder, ranks and resumption change nothing.
"""

import hashlib

import torch


def image_generator(name, sample, seed):
    """CPU generator of one image's sample; `sample` is an index, or "measurement"."""
    digest = hashlib.sha256(f"{seed}\0{sample}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class ImageRandom:
    """Random tensors for a batch; each image's rows come from its own generator.

    A tensor of more rows than there are generators holds that many rows an image: the contrasts
    of a composite that are restored side by side.
    """

    def __init__(self, generators):
        self.generators = generators

    def randn_like(self, x):
        """Standard normal noise of x's shape, dtype float32, on x's device."""
        shape = (len(x) // len(self.generators), *x.shape[1:])
        rows = [torch.randn(shape, generator=g) for g in self.generators]
        return torch.cat(rows).to(x.device, non_blocking=True)

    def poisson(self, rate):
        """Poisson counts of the given rates, of their shape and device."""
        parts = rate.cpu().chunk(len(self.generators))
        rows = [torch.poisson(p, generator=g) for p, g in zip(parts, self.generators, strict=True)]
        return torch.cat(rows).to(rate.device)
