"""NIfTI volumes."""

import math
import os

import numpy as np

from data.volumes import Volume
from util.errors import UserError
from util.files import replacing

EXTENSIONS = (".nii", ".nii.gz")
AXIAL = 2  # world axis, inferior to superior
MOST_COMPRESSION = 1032  # of deflate: no gzip file holds more bytes than so many times its own


def volume_name(path):
    """A file's name without .nii or .nii.gz."""
    name = os.path.basename(path)
    return name[: name.lower().rindex(".nii")]


class NiftiVolume(Volume):
    """A NIfTI file, restored along one of its axes.

    Slices are shown as radiologists do, patient's right on the left and anterior or superior up;
    what is written has the file's own order of voxels.

    Args:
        axis: 0, 1 or 2, the slice axis; None is the axis with the thickest voxels, and among
            equal ones that nearest to inferior-superior.
        volume: index along the fourth axis, of a file that has one.

    Raises:
        UserError: the file is no NIfTI file, or not one 3-D grey image.
    """

    def __init__(self, path, axis=None, volume=None):
        label = os.path.basename(path)
        self.path = path
        image = _open(path)
        self._check_type(image, label)
        self.shape = (*image.shape, 1, 1)[:3]
        self.index = self._fourth_axis(image.shape, volume, label)
        self._check_size(image, label)
        axis = self._thickest(image.affine) if axis is None else axis
        self.order, self.flips = self._display(image.affine, axis, label)
        super().__init__(volume_name(path), label, self.shape[axis])

    @staticmethod
    def _check_type(image, label):
        dtype = image.get_data_dtype()
        if dtype.fields:
            raise UserError(f"{label}: holds RGB colours, expected one grey value a voxel")
        if dtype.kind not in "iuf":
            raise UserError(f"{label}: expected real numbers, found {dtype}")

    @staticmethod
    def _fourth_axis(shape, volume, label):
        if len(shape) < 2 or 0 in shape:
            raise UserError(f"{label}: expected a 3-D image, found shape {shape}")
        extra = [n for n in shape[3:] if n > 1]
        if not extra:
            return None
        found = "×".join(map(str, shape))
        if len(shape) > 4:
            raise UserError(f"{label}: expected a 3-D image, found {len(shape)} axes, {found}")
        choice = f"data.volume: 0 to {shape[3] - 1} chooses one along the fourth axis"
        if volume is None:
            raise UserError(f"{label}: holds {shape[3]} volumes ({found}); {choice}")
        if not 0 <= volume < shape[3]:
            raise UserError(f"{label}: data.volume: no volume {volume}; {choice}")
        return volume

    @staticmethod
    def _check_size(image, label):
        """A header that claims more voxels than the file can hold may claim any amount."""
        holds = os.path.getsize(image.get_filename())
        if image.get_filename().lower().endswith(".gz"):
            holds *= MOST_COMPRESSION
        claimed = math.prod(image.shape) * image.get_data_dtype().itemsize
        if image.dataobj.offset + claimed > holds:
            raise UserError(f"{label}: truncated or damaged, holds less than its header says")

    def _thickest(self, affine):
        if 1 in self.shape:
            return max(i for i in range(3) if self.shape[i] == 1)
        sides = np.linalg.norm(affine[:3, :3], axis=0)
        thickest = np.flatnonzero(sides > 0.99 * sides.max())
        return int(max(thickest, key=lambda i: abs(affine[AXIAL, i]) / sides[i]))

    @staticmethod
    def _display(affine, axis, label):
        """(order of the voxel axes as (slice, row, column), slices that flip them).

        World axes point right, anterior, superior; rows and columns run the opposite way.
        """
        from nibabel.orientations import io_orientation

        orientation = io_orientation(affine)
        if not np.isfinite(orientation).all():
            raise UserError(f"{label}: its affine is singular, so it has no orientation")
        col, row = sorted((i for i in range(3) if i != axis), key=lambda i: orientation[i, 0])
        backwards = [slice(None, None, -1 if orientation[i, 1] > 0 else 1) for i in (row, col)]
        return (axis, row, col), (slice(None), *backwards)

    def load(self):
        image = _open(self.path)
        try:
            voxels = image.dataobj if self.index is None else image.dataobj[..., self.index]
            voxels = np.asarray(voxels, dtype=np.float32)
        except (OSError, EOFError, ValueError, MemoryError) as error:
            raise UserError(f"{self.label}: truncated or damaged ({_reason(error)})") from None
        return voxels.reshape(self.shape).transpose(self.order)[self.flips]

    def write(self, folder, voxels, description, identity, std=False):
        """Write (slices, H, W) as NAME.nii.gz with the file's header, in float32.

        Where the slices are finer than the file's, the voxels share out the same field of view.
        """
        source = _open(self.path)
        array = voxels[self.flips].transpose(np.argsort(self.order))
        factor = np.array(array.shape) // self.shape
        header = source.header.copy()
        header.set_data_dtype(np.float32)
        if (factor > 1).any():
            _refine(header, factor)
        shape = source.shape[: source.ndim if self.index is None else 3]
        array = array.reshape(*array.shape[: len(shape)], *[1] * (len(shape) - 3))
        header.set_data_shape(array.shape)
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, f"{self.name}.nii.gz")
        image = type(source)(array, header.get_best_affine(), header)
        with replacing(path) as temporary:
            image.to_filename(temporary)
        return path


def _refine(header, factor):
    """Divide voxels into `factor` along each axis; the operator's grid has no other offset.

    Input voxel i is centred between fine voxels f·i and f·i + f - 1, that is, at f·i + (f-1)/2:
    the bicubic kernel has an even number of taps, so its centre of mass lies half a pixel before
    the index f//2 it is said to be centred on, and a block mean's lies there too.
    """
    finer = np.diag([*(1 / factor), 1.0])
    finer[:3, 3] = -(factor - 1) / (2 * factor)
    qform, qcode = header.get_qform(coded=True)
    sform, scode = header.get_sform(coded=True)
    zooms = header.get_zooms()
    header.set_zooms([*(np.array(zooms[:3]) / factor[: len(zooms)]), *zooms[3:]])
    if qcode:
        header.set_qform(qform @ finer, qcode)
    if scode:
        header.set_sform(sform @ finer, scode)


def _open(path):
    import nibabel

    try:
        image = nibabel.load(path)
    except Exception as error:  # noqa: BLE001 - damaged headers fail in many ways
        name = os.path.basename(path)
        raise UserError(f"{name}: cannot be read as NIfTI ({_reason(error)})") from None
    return image


def _reason(error):
    return str(error).splitlines()[0] if str(error) else type(error).__name__
