"""``examples/train.py``: a run that is killed ends with the same bits, logs nothing twice, and leaves a loadable model."""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from bilevel.checkpoint import load_model
from bilevel.config import Experts, ModelConfig, Routing
from bilevel.config_json import config_to_dict
from bilevel.errors import ConfigError
from tests import ROOT

STEPS = 6


@pytest.fixture(scope="module", autouse=True)
def examples_on_the_path() -> Iterator[None]:
    sys.path.insert(0, str(ROOT / "examples"))
    yield
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    return importlib.import_module("corpus")


@pytest.fixture(scope="module")
def train() -> ModuleType:
    return importlib.import_module("train")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small sources to train on, and the configuration of a tiny model, in one folder."""
    folder, chance = tmp_path_factory.mktemp("material"), random.Random(3)
    words = ["def", "return", "import", "class", "self", "value", "for", "in", "range", "tensor", "block", "route"]
    for number in range(120):
        lines = [" ".join(chance.choices(words, k=8)) for _ in range(150)]
        (folder / f"source_{number}.py").write_text("\n".join(lines), encoding="utf-8")
    config = ModelConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
        routing=Routing(block_size=64, coarse_topk=4, topk=3, route_dim=4),
        experts=Experts(num_experts=4, n_group=2, topk_group=1, top_k=1, intermediate_size=8, layers=(1,)),
    )
    (folder / "config.json").write_text(json.dumps(config_to_dict(config)), encoding="utf-8")
    return folder


def arguments(out: Path, material: Path, *more: str, steps: int = STEPS) -> list[str]:
    fixed = ["--tokens-per-step", "1024", "--log-steps", "1", "--heldout-steps", "4", "--save-seconds", "0"]
    return [str(out), "--text", str(material), "--config", str(material), "--steps", str(steps), *fixed, *more]


@pytest.fixture(scope="module")
def straight(train: ModuleType, material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("straight") / "run"
    assert train.main(arguments(out, material)) == 0
    return out


def log(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in lines]


# Each stands in for a function of train.py and kills the process, as the kernel would, at the worst moment.
KILLS = {
    "before_the_first_save": """
advance = train.Run.advance
def dying(run):
    run.save = lambda: None
    return die() if run.step == 4 else advance(run)
train.Run.advance = dying
""",
    "between_log_and_save": """
save = train.Run.save
train.Run.save = lambda run: die() if run.step == 4 else save(run)
""",
    "during_a_save": """
save = train.torch.save
def torn(state, file):
    if state["step"] == 4:
        file.write(b"half a checkpoint")
        file.flush()
        die()
    save(state, file)
train.torch.save = torn
""",
}


@pytest.mark.parametrize("moment", KILLS)
def test_train_killed_and_resumed_equals_straight(
    moment: str, train: ModuleType, straight: Path, material: Path, tmp_path: Path
) -> None:
    program = f"import os, signal, sys, train\ndie = lambda: os.kill(os.getpid(), signal.SIGKILL)\n{KILLS[moment]}"
    program += "train.main(sys.argv[1:])"
    command = [sys.executable, "-c", program, *arguments(tmp_path / "run", material)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    killed = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "run" / "model").exists()
    assert train.main(arguments(tmp_path / "run", material)) == 0
    assert log(tmp_path / "run") == log(straight)
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (tmp_path / "run", straight)]
    assert weights[0] == weights[1]


def test_train_logs_every_step_once(straight: Path) -> None:
    lines = log(straight)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "heldout" in line] == [4, STEPS]
    assert {"cross_entropy", "level1", "group", "balance", "lr"} <= set(lines[0])


def test_train_writes_hugging_face_files(straight: Path) -> None:
    from transformers import AutoTokenizer

    model = load_model(straight / "model")
    tokenizer = AutoTokenizer.from_pretrained(straight / "model")
    ids = tokenizer("def value\n\tπ", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "def value\n\tπ"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, model.config.vocab_size)
    assert model(ids).isfinite().all()


def test_train_stops_on_request_and_continues(
    train: ModuleType, straight: Path, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = train.Run.advance

    def interrupted(run: object) -> dict[str, float]:
        if run.step == 2:  # type: ignore[attr-defined]
            signal.raise_signal(signal.SIGINT)
        return advance(run)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train.Run, "advance", interrupted)
    assert train.main([*arguments(tmp_path / "run", material), "--save-seconds", "1000"]) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert [line["step"] for line in log(tmp_path / "run")] == [1, 2, 3]
    monkeypatch.undo()
    assert train.main(arguments(tmp_path / "run", material)) == 0
    assert log(tmp_path / "run") == log(straight)


def test_train_of_another_model_in_the_same_folder_is_refused(
    train: ModuleType, straight: Path, material: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state = (straight / "state.pt").read_bytes()
    assert train.main([*arguments(straight, material), "--dense"]) == 2
    assert "belongs to a model of other sizes" in " ".join(capfd.readouterr().err.split())
    assert (straight / "state.pt").read_bytes() == state


def test_train_from_a_damaged_state_is_refused(
    train: ModuleType, material: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.pt").write_bytes(b"PK\x03\x04 cut short")
    assert train.main(arguments(tmp_path / "run", material)) == 2
    assert "state.pt is damaged; remove it to train anew" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(
    "options,message",
    [
        (["--steps", "0"], "--steps 0 must be greater than 0"),
        (["--steps", "2", "--minutes", "1"], "not allowed with argument"),
        (["--tokens-per-step", "1000"], "--tokens-per-step 1000 must be a multiple of 1024"),
    ],
    ids=["no steps", "steps and minutes", "odd tokens per step"],
)
def test_parse_refuses(train: ModuleType, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.parse(["out", *options])
    assert message in capsys.readouterr().err


def test_minutes_become_steps(train: ModuleType, material: Path, tmp_path: Path) -> None:
    options = [item for item in arguments(tmp_path / "run", material) if item not in ("--steps", str(STEPS))]
    assert train.main([*options, "--minutes", "0.001"]) == 0
    assert len(log(tmp_path / "run")) >= 1


def test_train_report_compares_two_runs(train: ModuleType, straight: Path, material: Path, tmp_path: Path) -> None:
    report = importlib.import_module("train_report")
    assert train.main([*arguments(tmp_path / "dense", material), "--dense"]) == 0
    assert report.main([str(straight), str(tmp_path / "dense"), str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    losses = written["heldout_nats_per_token"]
    assert set(losses) == {"512", "1024", "2048"}
    tokens = np.load(straight / "data" / "heldout.npy")
    assert losses["2048"]["tokens"] == (len(tokens) - 1) // 2048 * 2048
    assert all(0 < losses["512"][name] < 7 for name in ("two_level", "dense_twin", "two_level_weights_without_level1"))
    assert [set(layer) for layer in written["level1_recall"]["512"]] == [{"all", "free", "contested", "chance"}] * 2
    assert written["training"]["tokens_seen"] == STEPS * 1024
    assert (tmp_path / "out" / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    model, original = load_model(tmp_path / "out"), load_model(straight / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))


def test_read_documents_leaves_out_what_is_no_text(corpus: ModuleType, tmp_path: Path) -> None:
    for name, content in {
        "b/code.py": b"x = 1\n",
        "a.py": b"y = 2\n",
        "latin.py": b"# \xe9\n",
        "empty.py": b" \n",
        "special.py": b"'<|eos|>'",
        "site-packages/other.py": b"z = 3\n",
        "notes.txt": b"prose",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert corpus.read_documents(tmp_path) == {"a.py": "y = 2\n", "b/code.py": "x = 1\n"}


def test_read_documents_of_an_empty_folder(corpus: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no Python sources"):
        corpus.read_documents(tmp_path)


def test_pick_heldout_never_meets_the_training_text(corpus: ModuleType) -> None:
    documents = [f"# number {i}\n" * 200 for i in range(400)]
    training = [text for text in documents if not corpus.is_heldout(text)]
    picked = corpus.pick_heldout([*documents, *documents], most_bytes=8000)
    assert picked and not set(picked) & set(training)
    assert len(picked) == len(set(picked)) and sum(map(len, picked)) <= 8000
    assert corpus.split_documents(corpus.join_documents(picked)) == picked


@pytest.mark.parametrize("rows,length", [(1, 1), (2, 4), (3, 5)], ids=lambda value: str(value))
def test_batch_visits_every_window_once_in_a_pass(corpus: ModuleType, rows: int, length: int) -> None:
    tokens = np.arange(62, dtype=np.uint16)
    steps = 61 // length // rows

    def seen(start: int) -> list[int]:
        batches = [corpus.batch(tokens, step, rows=rows, length=length, seed=5)[0] for step in range(start, start + steps)]
        return [int(row[0]) for inputs in batches for row in inputs]

    first, second = seen(0), seen(steps)
    assert len(set(first)) == steps * rows and first != second
    inputs, targets = corpus.batch(tokens, 1, rows=rows, length=length, seed=5)
    assert inputs.shape == targets.shape == (rows, length) and (targets == inputs + 1).all()


def test_batch_and_cut_of_too_little_text(corpus: ModuleType) -> None:
    with pytest.raises(ConfigError, match="gives 9 tokens, fewer than one step takes"):
        corpus.batch(np.arange(9), 0, rows=3, length=4, seed=0)
    with pytest.raises(ConfigError, match="has 4 tokens, too few for a row of 4"):
        corpus.cut(np.arange(4), 4)
    assert corpus.cut(np.arange(10), 4).tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
