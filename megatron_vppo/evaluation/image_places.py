"""The places where the images of a benchmark may be, for rows that name them by path.

The paths in a benchmark's file are those of the machine that made it: PAPO-Eval's begin with `./data/images/`, whatever
folder its archive was unpacked into. So the ends of a path are looked for, the longest first.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from megatron_vppo.evaluation.encoded import EncodedImage, FileImage, ZipImage


class ImagePlaces:
    """Folders and zip archives in which images are looked for by path."""

    def __init__(self, folders: Sequence[Path], archives: Sequence[Path], *, by_name_alone: bool) -> None:
        """
        Args:
            by_name_alone: True if an image may be found by the name of its file; else its folder's name has to fit too.

        Raises:
            ValueError: an archive is no zip file.
        """
        self._folders = folders
        self._members = {archive: _members_by_ending(archive) for archive in archives}
        self._shortest = 1 if by_name_alone else 2
        self._found_with_folder: str | None = None
        self._found_by_name: str | None = None

    def find(self, path: str) -> EncodedImage:
        """Returns the image of a path; `check` says at the end whether names alone were enough.

        Raises ValueError, with the places looked at, if there is none.
        """
        for ending in _endings(path, self._shortest):
            if (image := self._at(ending)) is not None:
                if "/" in ending:
                    self._found_with_folder = self._found_with_folder or path
                elif "/" in path.replace("\\", "/").removeprefix("./"):
                    self._found_by_name = self._found_by_name or path
                return image
        raise ValueError(
            f"its image {path[:300]!r} is not in {self._names()}; set `images` to the folder or zip file of images"
        )

    def check(self) -> None:
        """Raises ValueError if an image was found by its name alone, and another one with its folder.

        Then folders count in these places, and the image is another one than the path's.
        """
        if self._found_by_name is not None and self._found_with_folder is not None:
            raise ValueError(
                f"the image {self._found_by_name[:300]!r} is not in {self._names()}, where one of its name is in "
                f"another folder, and {self._found_with_folder[:300]!r} is; complete the images"
            )

    def _at(self, ending: str) -> EncodedImage | None:
        """Returns the image whose path ends so; None if there is none, or an archive has several."""
        for folder in self._folders:
            if (folder / ending).is_file():
                return FileImage(folder / ending)
        for archive, members in self._members.items():
            found = members.get(ending, [])
            if ending in found or len(found) == 1:
                return ZipImage(archive, ending if ending in found else found[0])
        return None

    def _names(self) -> str:
        return ", ".join(str(place) for place in [*self._folders, *self._members])


def places_of(data_file: Path, images: str | None) -> ImagePlaces:
    """Returns the places to look at: those that are set, else the data file's own.

    Those are the folders around the file, and the archive `<split>_images.zip` there (PAPO_eval on the hub).
    """
    if images is not None:
        named = Path(images)
        if not named.exists():
            raise ValueError(f"images: {named} does not exist")
        folders, archives = ([named], []) if named.is_dir() else ([], [named])
        return ImagePlaces(folders, archives, by_name_alone=True)
    folder = data_file if data_file.is_dir() else data_file.parent
    split = data_file.stem.partition("-00")[0]  # of `<split>-00000-of-00001.parquet`
    near = [folder, *folder.parents[:2]]
    archives = [place / f"{split}_images.zip" for place in near if (place / f"{split}_images.zip").is_file()]
    return ImagePlaces(near, archives, by_name_alone=False)


def _endings(path: str, shortest: int) -> Iterator[str]:
    parts = [part for part in PurePosixPath(path.replace("\\", "/")).parts if part not in ("/", ".", "..")]
    for begin in range(max(1, len(parts) - shortest + 1)):
        yield "/".join(parts[begin:])


def _members_by_ending(archive: Path) -> dict[str, list[str]]:
    """Lists the members of an archive by every ending of their paths."""
    found: dict[str, list[str]] = {}
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.namelist() if not member.endswith("/")]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive} is no zip file, or is damaged: {error}") from error
    for member in members:
        if not member.startswith("__MACOSX/"):
            for ending in _endings(member, 1):
                found.setdefault(ending, []).append(member)
    return found
