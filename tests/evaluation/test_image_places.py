"""Images are found by the ends of their paths, and never an image of another folder's by its name alone."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from megatron_vppo.evaluation.encoded import FileImage, ZipImage
from megatron_vppo.evaluation.image_places import places_of
from tests.evaluation.sources.copies import png


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png("red"))
    return path


def test_the_longest_end_of_a_path_is_found_first(tmp_path: Path) -> None:
    near, far = put(tmp_path / "data" / "images" / "geo" / "1.png"), put(tmp_path / "data" / "papo" / "geo" / "1.png")
    places = places_of(tmp_path / "data" / "papo" / "geo.json", None)
    assert places.find("./data/images/geo/1.png") == FileImage(near)
    assert places.find("C:\\images\\geo\\1.png") == FileImage(near)
    assert places.find("geo/1.png") == FileImage(far)


def test_a_name_alone_is_not_enough_around_the_data_file(tmp_path: Path) -> None:
    put(tmp_path / "1.png")
    with pytest.raises(ValueError, match="set `images`"):
        places_of(tmp_path / "geo.json", None).find("images/1.png")
    assert places_of(tmp_path / "geo.json", str(tmp_path)).find("images/1.png") == FileImage(tmp_path / "1.png")


def test_a_name_that_an_archive_has_twice_is_not_enough(tmp_path: Path) -> None:
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("a/1.png", png("red"))
        opened.writestr("b/1.png", png("blue"))
        opened.writestr("b/2.png", png("blue"))
    places = places_of(tmp_path / "geo.json", str(archive))
    assert places.find("./data/a/1.png") == ZipImage(archive, "a/1.png")
    assert places.find("c/2.png") == ZipImage(archive, "b/2.png")
    with pytest.raises(ValueError, match=r"its image 'c/1\.png' is not in"):
        places.find("c/1.png")


def test_the_whole_path_of_a_member_wins_over_ends_of_others(tmp_path: Path) -> None:
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for member in ("a/1.png", "1.png"):
            opened.writestr(member, png("red"))
    assert places_of(tmp_path / "geo.json", str(archive)).find("1.png") == ZipImage(archive, "1.png")


@pytest.mark.parametrize("order", [("a/1.png", "c/2.png"), ("c/2.png", "a/1.png")])
def test_a_name_alone_is_not_enough_where_folders_fit_others(tmp_path: Path, order: tuple[str, str]) -> None:
    """c/2.png is missing, and b/2.png is another image."""
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for member in ("a/1.png", "b/2.png"):
            opened.writestr(member, png("red"))
    places = places_of(tmp_path / "geo.json", str(archive))
    for path in order:
        places.find(path)
    with pytest.raises(ValueError, match=r"the image 'c/2\.png' is not in .*images\.zip, .* 'a/1\.png' is"):
        places.check()


def test_names_alone_are_enough_where_no_folder_fits(tmp_path: Path) -> None:
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("all/1.png", png("red"))
        opened.writestr("all/2.png", png("red"))
    places = places_of(tmp_path / "geo.json", str(archive))
    assert places.find("./geo/1.png") == ZipImage(archive, "all/1.png")
    assert places.find("2.png") == ZipImage(archive, "all/2.png")
    places.check()


def test_places_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"images: .*none does not exist"):
        places_of(tmp_path / "geo.json", str(tmp_path / "none"))
    (tmp_path / "a.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"a\.zip is no zip file, or is damaged"):
        places_of(tmp_path / "geo.json", str(tmp_path / "a.zip"))
