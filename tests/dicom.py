"""DICOM slides as scanners and archives write them: a series of files, one for each level."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import VLWholeSlideMicroscopyImageStorage, generate_uid

from tests.zoo import padded, smaller

TILE = 128


def write_series(
    folder: Path, picture: np.ndarray, mpp: float = 0.5, levels: Iterable[int] = (1, 2, 4),
    ending: str = ".dcm", refers: bool = False,
) -> list[Path]:  # fmt: skip
    """Write a slide's series, uncompressed, and a label; return its files, the finest level first.

    `refers` puts another series' identifiers into each file, as of a study that has several.
    """
    folder.mkdir(parents=True, exist_ok=True)
    common = {"SeriesInstanceUID": generate_uid(), "StudyInstanceUID": generate_uid(),
              "FrameOfReferenceUID": generate_uid()}  # fmt: skip
    paths, number = [], len(list(folder.iterdir()))
    for times in levels:
        level = smaller(picture, times) if times > 1 else picture
        paths.append(folder / f"{number + len(paths):04}{ending}")
        _write(paths[-1], level, "VOLUME", mpp * times, common, refers)
    paths.append(folder / f"{number + len(paths):04}{ending}")
    _write(paths[-1], np.full((TILE, TILE, 3), 220, np.uint8), "LABEL", mpp, common, refers)
    return paths


def _write(path, picture, kind, mpp, common, refers) -> None:
    height, width = picture.shape[:2]
    whole = padded(picture, TILE, 255)
    rows, columns = (side // TILE for side in whole.shape[:2])
    frames = whole.reshape(rows, TILE, columns, TILE, 3).swapaxes(1, 2)
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    data.file_meta.MediaStorageSOPClassUID = VLWholeSlideMicroscopyImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.SOPClassUID = VLWholeSlideMicroscopyImageStorage
    for name, value in common.items():
        setattr(data, name, value)
    if refers:
        other = Dataset()
        other.SeriesInstanceUID = generate_uid()
        data.ReferencedSeriesSequence = [other]
    data.Modality = "SM"
    data.ImageType = ["ORIGINAL", "PRIMARY", kind, "NONE" if mpp == 0.5 else "RESAMPLED"]
    data.Rows = data.Columns = TILE
    data.TotalPixelMatrixColumns, data.TotalPixelMatrixRows = width, height
    data.TotalPixelMatrixFocalPlanes = data.NumberOfOpticalPaths = 1
    data.NumberOfFrames = rows * columns
    data.SamplesPerPixel, data.PhotometricInterpretation = 3, "RGB"
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation, data.PlanarConfiguration = 7, 0, 0
    data.DimensionOrganizationType = "TILED_FULL"
    measures, shared, path_of_light = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = [mpp / 1000, mpp / 1000]
    shared.PixelMeasuresSequence = [measures]
    data.SharedFunctionalGroupsSequence = [shared]
    path_of_light.OpticalPathIdentifier = "0"
    data.OpticalPathSequence = [path_of_light]
    data.PixelData = np.ascontiguousarray(frames).tobytes()
    data.save_as(path, enforce_file_format=True)
