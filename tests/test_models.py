"""Models and tokenizers: what loads, what is refused, what travels."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gru_core import models
from gru_core.config import ModelConfig, PrepareConfig, RunConfig
from gru_core.errors import InputError
from pipelines import package
from tests import small


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    models.save_model(small.model(), small.tokenizer(), path)
    return path


def test_round_trip(folder: Path) -> None:
    net = models.load_model(str(folder), ModelConfig())
    assert torch.equal(small.weights(net), small.weights(small.model()))
    tok = models.load_tokenizer(str(folder))
    assert tok.encode("who wrote book 3") == small.tokenizer().encode("who wrote book 3")


def test_dtypes(folder: Path) -> None:
    assert next(models.load_model(str(folder), ModelConfig(dtype="bfloat16")).parameters()).dtype == torch.float32
    with pytest.warns(UserWarning, match="small updates are lost"):
        pure = models.load_model(str(folder), ModelConfig(dtype="pure_bfloat16"))
    assert next(pure.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "pure_bfloat16"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_packed_weights_travel(folder: Path, dtype: str) -> None:
    config = ModelConfig(dtype=dtype)  # type: ignore[arg-type]
    net = models.load_model(str(folder), config)
    state = torch.random.get_rng_state()
    copy = models.unpack_weights(models.pack_weights(net), config)
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator is left alone"
    assert torch.equal(small.weights(net), small.weights(copy))
    ids = torch.tensor([[2, 5, 6]])
    assert torch.equal(net.eval()(ids).logits, copy.eval()(ids).logits)
    with torch.no_grad():
        next(copy.parameters()).add_(1)
    assert not torch.equal(small.weights(net), small.weights(copy)), "a copy has weights of its own"


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("model.safetensors", "no \\*.safetensors weights"),
        ("tokenizer.json", "no tokenizer"),
        ("config.json", "no config.json"),
    ],
)
def test_incomplete_folders_are_refused(folder: Path, tmp_path: Path, remove: str, message: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / remove).unlink()
    with pytest.raises(InputError, match=message):
        models.check_model(str(broken))


def test_a_tokenizer_of_its_own(folder: Path, tmp_path: Path) -> None:
    """Models that come without one (MUSE's) take the one that model.tokenizer names, the retain model too."""
    bare, alone = tmp_path / "bare", tmp_path / "tokenizer"
    shutil.copytree(folder, bare)
    alone.mkdir()
    for file in bare.glob("tokenizer*"):
        shutil.move(file, alone / file.name)
    config = ModelConfig(path=str(bare), tokenizer=str(alone))
    models.check_model(str(bare), "retain_model", config.tokenizer)
    expected = small.tokenizer().encode("who wrote book 3")
    for name in ("model.path", "retain_model"):
        assert models.tokenizer_of(str(bare), config, name).encode("who wrote book 3") == expected
    with pytest.raises(InputError, match=r"retain_model: folder .* has no tokenizer"):
        models.tokenizer_of(str(bare), ModelConfig(path=str(bare)), "retain_model")
    with pytest.raises(InputError, match=r"model\.tokenizer: there is no folder './nowhere'"):
        models.check_model(str(bare), "model.path", "./nowhere")
    with pytest.raises(
        InputError, match=r"model\.tokenizer: got .*, allowed: null, or a folder or hub id; null with prep"
    ):
        RunConfig(model=ModelConfig(tokenizer=str(alone)))
    sent = {item.key: item for item in package.find_inputs(RunConfig(model=config))}["model.tokenizer"]
    assert set(sent.files) == {file.name for file in alone.iterdir()}


def test_pickled_weights_and_missing_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(folder, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(small.model().state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickled weights are not read"):
        models.load_model(str(pickled), ModelConfig())
    with pytest.raises(InputError, match="there is no folder '/no/such/model'"):
        models.load_model("/no/such/model", ModelConfig())


def test_a_hub_model_that_cannot_be_had_is_told_before_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    asked: list[str] = []

    def offline(path: str, **options: object) -> None:
        asked.append(path)
        assert options == {"trust_remote_code": False}
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(InputError, match=r"model\.path: cannot load .some/model. from the hub: We couldn.t connect$"):
        models.check_model("some/model")
    assert asked == ["some/model"]


def test_truncated_and_incomplete_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    """transformers would fill a missing tensor with random numbers and go on."""
    from safetensors.torch import load_file, save_file

    truncated, incomplete = tmp_path / "truncated", tmp_path / "incomplete"
    for copy in (truncated, incomplete):
        shutil.copytree(folder, copy)
    data = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(InputError, match="cannot load"):
        models.load_model(str(truncated), ModelConfig())
    tensors = load_file(incomplete / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, incomplete / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 of the model's tensors, such as 'model\.norm\.weight'"):
        models.load_model(str(incomplete), ModelConfig())


def test_generation_settings_travel(folder: Path) -> None:
    net = models.load_model(str(folder), ModelConfig())
    net.generation_config.eos_token_id = [3, 7]  # type: ignore[union-attr]
    copy = models.unpack_weights(models.pack_weights(net), ModelConfig())
    assert copy.generation_config.eos_token_id == [3, 7]  # type: ignore[union-attr]


def test_remote_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    """A folder whose config asks for code of its own is refused, and the code never runs."""
    evil = tmp_path / "evil"
    shutil.copytree(folder, evil)
    shape = json.loads((evil / "config.json").read_text())
    shape |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}}
    (evil / "config.json").write_text(json.dumps(shape))
    (evil / "evil.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    with pytest.raises(InputError, match="cannot load"):
        models.load_model(str(evil), ModelConfig())
    assert not (evil / "ran").exists()


def test_a_small_model_is_the_same_for_a_seed() -> None:
    state = torch.random.get_rng_state()
    a, b, c = (small.model(seed=s) for s in (0, 0, 1))
    assert torch.equal(small.weights(a), small.weights(b))
    assert not torch.equal(small.weights(a), small.weights(c))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_tokenizers_give_the_text_back(kind: str) -> None:
    texts = ['The author, born in 1931, wrote "Two Rivers".', "Who is she?"]
    tok = models.build_tokenizer(texts, PrepareConfig(tokenizer=kind, vocab_size=400))  # type: ignore[arg-type]
    for text in texts:
        assert tok.decode(tok.encode(text), skip_special_tokens=True).strip() == text


def test_gru_core_needs_neither_ray_nor_mlflow() -> None:
    """Importing the core and all that a step uses, with Ray, MLflow and the pipelines made impossible."""
    code = """
import sys
for name in ("ray", "mlflow", "pipelines", "datasets", "scipy", "optuna", "pydantic"):
    sys.modules[name] = None
from tests import small
net = small.model()
print(small.build(small.config(2), net)().steps)
import gru_core.benchmarks, gru_core.metrics, gru_core.frontier
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"


def test_import_direction() -> None:
    """tests -> pipelines -> gru_core, never the other way; ray and mlflow only in pipelines."""
    import ast

    root = Path(__file__).parents[1]
    for file in sorted((root / "gru_core").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            bad = [n for n in names if n.split(".")[0] in ("ray", "mlflow", "pipelines", "tests")]
            assert not bad, f"{file} imports {bad}"
