"""Make the samples of the Colin27 T1 head: the slices of mri_256_orig, the volume of colin27.

    python data/make_samples.py /usr/share/mricron/templates/ch2.nii.gz

The volume comes with Debian's package mricron-data and with MRIcron; see
mri_256_orig/NOTICE.md. Needs nibabel.
"""

import os
import sys

import imageio.v3 as iio
import nibabel as nib
import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
AIR = 0.12  # of white; darker is no head
SLICES = range(32, 141, 12)  # axial, in mm above the lowest slice: cerebellum to vertex
SIZE = 256
WHITE_PERCENTILE = 99.9  # of the volume; what is brighter (fat, vessels) is clipped


def write_volume(volume_path):
    """The head alone, without the air beside it, in the file's own 8 bits."""
    image = nib.as_closest_canonical(nib.load(volume_path))
    voxels = np.asarray(image.dataobj)
    head = voxels > AIR * np.percentile(voxels, WHITE_PERCENTILE)
    box = []
    for axis in range(3):
        others = tuple(i for i in range(3) if i != axis)
        places = np.flatnonzero(head.sum(axis=others) > 100)
        box.append(slice(int(places[0]), int(places[-1]) + 1))
    cut = image.slicer[box[0], box[1], box[2]]
    cut.header["descrip"] = b"Colin27 T1, see NOTICE.md"
    os.makedirs(os.path.join(HERE, "colin27"), exist_ok=True)
    nib.save(cut, os.path.join(HERE, "colin27", "colin27_t1.nii.gz"))


def main(volume_path):
    write_volume(volume_path)
    out = os.path.join(HERE, "mri_256_orig")
    os.makedirs(out, exist_ok=True)
    volume = np.asarray(nib.as_closest_canonical(nib.load(volume_path)).dataobj, dtype=np.float64)
    volume = np.clip(volume * (255 / np.percentile(volume, WHITE_PERCENTILE)), 0, 255)
    for z in SLICES:
        axial = np.rot90(volume[:, :, z])  # anterior up, 1 mm pixels
        rows, cols = ((SIZE - n) // 2 for n in axial.shape)
        canvas = np.zeros((SIZE, SIZE), np.uint8)
        canvas[rows : rows + axial.shape[0], cols : cols + axial.shape[1]] = np.rint(axial)
        iio.imwrite(os.path.join(out, f"colin27_t1_z{z:03d}.png"), canvas)


if __name__ == "__main__":
    main(sys.argv[1])
