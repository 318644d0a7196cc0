"""Code that comes with a model is refused by name: it is not run, and nobody is asked."""

import builtins
import json
import shutil
from pathlib import Path

import pytest

from acetate.models.text import TextEncoder
from data_prep.captioner import Captioner, Look
from tests.data_prep.tiny_captioners import save_blip

CODE = 'open({mark!r}, "w").close()\nclass Own: pass\n'


@pytest.fixture(autouse=True)
def nobody(monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asks on stdin"))


def with_code(file: Path, mark: Path, held: dict) -> None:
    """Adds an auto_map, as deep as `held` says, and the code that it names."""
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**before, **held}))
    (file.parent / "own.py").write_text(CODE.format(mark=str(mark)))


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("tokenizer/tokenizer_config.json", {"AutoTokenizer": ["own.Own", "own.Own"]}),
        ("tokenizer/config.json", {"AutoConfig": "own.Own"}),
        ("text_encoder/config.json", {"AutoModel": "other/repository--own.Own"}),
    ],
)
def test_of_a_text_encoder(wan_folder, tmp_path, file, names):
    mark = tmp_path / "ran"
    folder = shutil.copytree(wan_folder, tmp_path / "wan")
    with_code(folder / file, mark, {"auto_map": names, "tokenizer_class": "Own"})
    with pytest.raises(ValueError, match=rf"wan\.text_encoder=.*{file} names code of its own"):
        TextEncoder(str(folder), 8)
    assert not mark.exists()


@pytest.mark.parametrize("file", ["config.json", "processor_config.json"])
def test_of_a_captioner(tmp_path, file):
    mark, folder = tmp_path / "ran", tmp_path / "blip"
    save_blip(folder)
    names = {"auto_map": {"AutoImageProcessor": "own.Own"}}
    with_code(folder / file, mark, {"image_processor": names} if "proc" in file else names)
    with pytest.raises(ValueError, match=rf"captioner: .*{file} names code of its own"):
        Captioner(
            folder,
            instruction="",
            look=Look(1, "sheet", "grey"),
            max_tokens=2,
            dtype="float32",
            device="cpu",
        )
    assert not mark.exists()
