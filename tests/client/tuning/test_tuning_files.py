"""What is trained, saved and loaded: PEFT's files both ways, and bad files."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from petalite.bloom.adapters import CONFIG_FILE, TARGETS, TENSORS_FILE
from petalite.bloom.config import BloomConfig
from petalite.client.tuning import LoraAdapter, PromptTuning, SequenceClassifier, hidden_states
from petalite.errors import CheckpointError
from petalite.models import FAIRYTALE, find_model
from tests.client.tuning.local import relative_error, transformers_model

# peft asks transformers by a name that is to go
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.randint(4, 6000, (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
CONFIG = BloomConfig.load(find_model(FAIRYTALE))


def randomized(module: nn.Module, seed: int = 0) -> Any:
    """As if trained: B is not zero any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return module


def adapter(**options: Any) -> LoraAdapter:
    made: LoraAdapter = randomized(LoraAdapter(CONFIG, **{"rank": 4, "alpha": 6.0, **options}))
    return made


def close(ours: Tensor, theirs: Tensor) -> bool:
    """B A is added to W here, and to W's product there."""
    return relative_error(ours, theirs) <= 1e-6


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_peft_loads_our_adapter_and_computes_the_same(rank_stabilized: bool, model: Any, tmp_path: Path) -> None:
    ours = adapter(targets=list(TARGETS), blocks=[1, 3, 7], rank_stabilized=rank_stabilized)
    ours.save(tmp_path, "fairytale")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(transformers_model()), tmp_path)
    logits = model.head(hidden_states(model, IDS, adapter=ours))
    assert close(logits, theirs(IDS).logits)
    assert not close(logits, transformers_model()(IDS).logits)


def test_we_load_pefts_adapter_and_compute_the_same(model: Any, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=r".*\.(2|5)\.(self_attention\.dense|mlp\.dense\w+)|.*\.6\..*value"
    )
    theirs = peft.get_peft_model(copy.deepcopy(transformers_model()), config)
    randomized(nn.ParameterList(p for p in theirs.parameters() if p.requires_grad))
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    ours = LoraAdapter.load(tmp_path, CONFIG)
    assert (ours.rank, ours.scaling, len(ours.tensors)) == (3, 5 / 3, 2 * (2 * 3 + 1))
    assert close(model.head(hidden_states(model, IDS, adapter=ours)), theirs(IDS).logits)
    ours.save(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(transformers_model()), tmp_path / "again")
    assert torch.equal(again(IDS).logits, theirs(IDS).logits)


def test_a_new_adapter_begins_as_pefts() -> None:
    """The same distribution: bounds by the inputs' number, and nothing added yet."""
    torch.manual_seed(0)
    ours = LoraAdapter(CONFIG, targets=["dense_4h_to_h"])
    theirs = peft.get_peft_model(
        copy.deepcopy(transformers_model()), peft.LoraConfig(r=8, target_modules=["dense_4h_to_h"])
    )
    assert (ours.rank, ours.scaling) == (8, 1.0)
    their_tensors = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert {f"base_model.model.{name}" for name in ours.tensors} == set(their_tensors)
    for name, tensor in ours.tensors.items():
        other = their_tensors[f"base_model.model.{name}"]
        assert tensor.shape == other.shape
        assert float(tensor.detach().abs().max()) == pytest.approx(float(other.detach().abs().max()), rel=0.01)


def test_peft_loads_our_soft_prompt_and_computes_the_same(model: Any, tmp_path: Path) -> None:
    ours = randomized(PromptTuning(CONFIG, 5))
    ours.save(tmp_path, "fairytale")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(transformers_model()), tmp_path)
    logits = model.head(hidden_states(model, IDS, mask=MASK, soft_prompt=ours))
    assert close(logits[MASK == 1], theirs(IDS, attention_mask=MASK).logits[:, 5:][MASK == 1])
    theirs.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    assert torch.equal(PromptTuning.load(tmp_path / "again", CONFIG).prompt_embeddings, ours.prompt_embeddings)


def test_a_deep_prompt_comes_back_and_peft_does_not_mistake_it(tmp_path: Path) -> None:
    ours = randomized(PromptTuning(CONFIG, 3, deep=True))
    ours.save(tmp_path)
    again = PromptTuning.load(tmp_path, CONFIG)
    assert again.deep_prompts is not None and torch.equal(again.deep_prompts, ours.deep_prompts)
    assert torch.equal(again.prompt_embeddings, ours.prompt_embeddings)
    with pytest.raises(KeyError, match="DEEP_PROMPT_TUNING"):
        peft.PeftModel.from_pretrained(copy.deepcopy(transformers_model()), tmp_path)


def test_a_classifier_is_that_of_transformers_and_comes_back(model: Any, tmp_path: Path) -> None:
    from transformers import BloomForSequenceClassification

    theirs = BloomForSequenceClassification(transformers_model().config).eval()
    theirs.transformer = transformers_model().transformer
    ours = SequenceClassifier(CONFIG, ["calm", "wild"])
    ours.score.weight = theirs.score.weight
    ours.save(tmp_path)
    again = SequenceClassifier.load(tmp_path, CONFIG)
    assert again.classes == ("calm", "wild")
    for mask in (MASK, MASK.flip(1)):
        ids = IDS.masked_fill(mask == 0, 3)
        assert close(again(model, ids, mask=mask), theirs(ids, attention_mask=mask).logits)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], Path]:
    """Directories of good files, to be spoilt."""
    adapter().save(tmp_path / "lora")
    PromptTuning(CONFIG, 3).save(tmp_path / "prompt")
    PromptTuning(CONFIG, 3, deep=True).save(tmp_path / "deep")
    SequenceClassifier(CONFIG, ["a", "b"]).save(tmp_path / "classifier")
    return tmp_path.joinpath


LOADERS: dict[str, Callable[[Path, BloomConfig], Any]] = {
    "lora": LoraAdapter.load,
    "prompt": PromptTuning.load,
    "deep": PromptTuning.load,
    "classifier": SequenceClassifier.load,
}


def spoil_tensors(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def first(tensors: dict[str, Tensor]) -> str:
    return min(tensors)


TENSOR_FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "not finite": (lambda t: t[first(t)].view(-1)[0].fill_(float("nan")), "not finite"),
    "integers": (lambda t: t.update({first(t): t[first(t)].to(torch.int32)}), "dtype I32"),
    "an extra tensor": (lambda t: t.update(extra=torch.zeros(1)), "extra"),
    "a tensor missing": (lambda t: t.pop(first(t)), "other half|expected"),
    "another shape": (lambda t: t.update({first(t): t[first(t)][..., 1:].contiguous()}), "shape"),
    "nothing": (lambda t: t.clear(), "no tensors|none"),
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_a_file_of_wrong_tensors_is_one_line(kind: str, fault: str, saved: Callable[[str], Path]) -> None:
    change, words = TENSOR_FAULTS[fault]
    spoil_tensors(saved(kind), change)
    refused(kind, saved, words)


def refused(kind: str, saved: Callable[[str], Path], words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        LOADERS[kind](saved(kind), CONFIG)
    text = str(caught.value)
    assert text.startswith(str(saved(kind))) and "\n" not in text and len(text) < 400


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("fault", ["gone", "truncated", "text", "empty"])
def test_a_damaged_file_is_one_line(kind: str, fault: str, saved: Callable[[str], Path]) -> None:
    (file,) = saved(kind).glob("*.safetensors")
    whole = file.read_bytes()
    file.unlink()
    if fault != "gone":
        file.write_bytes({"truncated": whole[:-7], "text": b"{}" * 20, "empty": b""}[fault])
    refused(kind, saved, "no such file|not a safetensors file")
    shutil.rmtree(saved(kind))
    refused(kind, saved, "no such file")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": 0}, "r is 0"),
        ({"r": "8"}, "r is '8'"),
        ({"r": 5}, r"shape \[4, 256\], expected \[5, 256\]"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["score"]}, "modules_to_save"),
        ({"rank_pattern": {"dense": 2}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "model's own weights"),
        ({"use_rslora": 1}, "use_rslora"),
    ],
)
def test_an_adapter_that_would_be_computed_wrongly_is_refused(
    changes: dict[str, Any], words: str, saved: Callable[[str], Path]
) -> None:
    path = saved("lora") / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused("lora", saved, words)


def test_an_adapter_of_another_model_is_refused(saved: Callable[[str], Path]) -> None:
    tensors = load_file(saved("lora") / TENSORS_FILE)
    beyond = {name.replace(".h.0.", ".h.8."): tensor for name, tensor in tensors.items()}
    save_file(beyond, saved("lora") / TENSORS_FILE)
    refused("lora", saved, "block 8 of a model of 8")


def test_parts_of_a_deep_prompt_must_agree(saved: Callable[[str], Path]) -> None:
    spoil_tensors(saved("deep"), lambda t: t.update(prompt_embeddings=t["prompt_embeddings"][:2].contiguous()))
    refused("deep", saved, "3 tokens, the others of 2")


@pytest.mark.parametrize("classes", [[], ["a", "a"], [1, 2], "ab", None])
def test_a_classifiers_names_are_checked(classes: Any, saved: Callable[[str], Path]) -> None:
    (saved("classifier") / "classifier.json").write_text(json.dumps({"classes": classes}))
    refused("classifier", saved, "classes")


@pytest.mark.parametrize(
    "make",
    [
        lambda: LoraAdapter(CONFIG, rank=0),
        lambda: LoraAdapter(CONFIG, targets=["lm_head"]),
        lambda: LoraAdapter(CONFIG, targets=[]),
        lambda: LoraAdapter(CONFIG, blocks=[8]),
        lambda: PromptTuning(CONFIG, 0),
        lambda: PromptTuning(CONFIG, 2, init=torch.zeros(3, 256)),
        lambda: SequenceClassifier(CONFIG, []),
        lambda: SequenceClassifier(CONFIG, ["a", "a"]),
    ],
)
def test_a_beginning_that_makes_no_sense_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"rank|layer|block|prompt|classes"):
        make()
