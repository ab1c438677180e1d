import pytest
from words import write


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "texts"
    place.mkdir()
    for i in range(6):
        write(place, f"{i}.txt", i)
    return place
