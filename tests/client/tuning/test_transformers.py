"""transformers and PEFT over servers in memory, against the same on a local model."""

from __future__ import annotations

import copy
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    BloomForSequenceClassification,
    DynamicCache,
    PreTrainedTokenizerFast,
    TextStreamer,
    Trainer,
    TrainingArguments,
    set_seed,
)

import petalite
from petalite.transformers import RemoteBloomForCausalLM, RemoteBloomForSequenceClassification, RemoteCache
from tests.client.tuning.local import relative_error, transformers_model

# peft asks transformers by a name that is to go
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ROOT = Path(__file__).resolve().parents[3]
PROMPTS = ["Once upon a time", "The little bear went into the dark wood and saw", "A king"]
SHORT = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def remote(here: Any) -> RemoteBloomForCausalLM:
    return RemoteBloomForCausalLM(here.model).eval()


@pytest.fixture(scope="module")
def tokenizer(here: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=here.model.remote.tokenizer, pad_token="<pad>", padding_side="left", model_input_names=INPUTS
    )


INPUTS = ["input_ids", "attention_mask"]


def local() -> Any:
    return transformers_model()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 4},
        {"num_beams": 4, "num_return_sequences": 2, "no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.3},
        {"do_sample": True, "temperature": 0.8, "top_k": 40, "top_p": 0.9},
        {"use_cache": False},
        {"min_new_tokens": 12, "bad_words_ids": [[262], [534]]},
    ],
    ids=str,
)
def test_generate_gives_the_same_ids_for_a_left_padded_batch(
    options: dict[str, Any], here: Any, remote: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    assert int((batch["attention_mask"] == 0).sum()) == 14
    told = []
    for model in (local(), remote):
        set_seed(7)
        told.append(model.generate(**batch, **{**SHORT, "use_cache": True, **options}))
    assert torch.equal(*told)
    assert here.world.cache_left_over() == 0


def test_a_streamer_hears_the_same(remote: Any, tokenizer: PreTrainedTokenizerFast, capsys: Any) -> None:
    ids = tokenizer(PROMPTS[0], return_tensors="pt")
    heard = []
    for model in (local(), remote):
        model.generate(**ids, **SHORT, streamer=TextStreamer(tokenizer))
        heard.append(capsys.readouterr().out)
    assert heard[0] == heard[1] and heard[0].startswith(PROMPTS[0]) and len(heard[0]) > 40


def test_drafts_that_are_not_taken_are_rolled_back(remote: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Prompt lookup: tokens guessed from the prompt are checked several at a time, and cropped where they are wrong."""
    ids = tokenizer("The king and the queen and the king and", return_tensors="pt")
    told = [m.generate(**ids, **SHORT, use_cache=True, prompt_lookup_num_tokens=3) for m in (local(), remote)]
    assert torch.equal(*told)


def test_a_cache_of_ones_own_goes_on_where_it_ended(remote: Any, here: Any, tokenizer: Any) -> None:
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    whole = local().generate(ids, **SHORT)
    with RemoteCache(here.model) as cache:
        half = remote.generate(ids, max_new_tokens=5, do_sample=False, past_key_values=cache)
        assert torch.equal(half, whole[:, : half.shape[1]])
        assert cache.get_seq_length() == half.shape[1] - 1
        assert torch.equal(remote.generate(half, max_new_tokens=7, do_sample=False, past_key_values=cache), whole)
    assert here.world.cache_left_over() == 0


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("masked", ["left", "right", "holes"])
def test_hidden_states_and_logits_are_transformers(masked: str, cached: bool, remote: Any) -> None:
    """At all real tokens; relative error in norm at most 1e-6 (ALiBi counts from the other end)."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 6000, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0] = torch.tensor(
        {"left": [0] * 4 + [1] * 5, "right": [1] * 5 + [0] * 4, "holes": [1, 1, 0, 0, 1, 1, 0, 1, 1]}[masked]
    )
    real = mask == 1
    with torch.no_grad():
        theirs = local()(ids, attention_mask=mask, output_hidden_states=True)
        ours = remote(ids, attention_mask=mask, output_hidden_states=True, use_cache=cached)
        plain = remote(ids, attention_mask=mask, use_cache=cached)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 9
    for state, due in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert relative_error(state[real], due[real]) <= 1e-6
    assert relative_error(ours.logits[real], theirs.logits[real]) <= 1e-6
    assert relative_error(plain.logits[real], theirs.logits[real]) <= 1e-6
    assert (plain.past_key_values is not None) == cached
    for output in (ours, plain):
        if cached:
            output.past_key_values.reset()


def test_generate_gives_hidden_states(remote: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_hidden_states": True}
    theirs, ours = (m.generate(**batch, **options, use_cache=True, num_beams=2) for m in (local(), remote))
    assert torch.equal(ours.sequences, theirs.sequences)
    for step, due in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        for state, expected in zip(step, due, strict=True):
            assert state.shape == expected.shape
            assert relative_error(state[:, -1], expected[:, -1]) <= 1e-6


# --- learning ---------------------------------------------------------------------------------------------------------

TEXTS = ["The dragon was sad and grey.", "The king laughed.", "A small bird sang in the old tree all day."]


def prompt_tuning() -> Any:
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)


def p_tuning() -> Any:
    return peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=32)


def with_peft(model: Any, config: Any) -> Any:
    """The same beginning every time."""
    torch.manual_seed(11)
    return peft.get_peft_model(model, config)


def make_local() -> Any:
    """Without dropout, of which servers do none."""
    model = copy.deepcopy(transformers_model())
    for module in model.modules():
        if hasattr(module, "hidden_dropout"):
            module.hidden_dropout = 0.0
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("make_config", [prompt_tuning, p_tuning])
def test_peft_learns_the_same(make_config: Any, here: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Gradients of the first step within 1e-5 in norm, the loss curve within 1e-4, and the same words at the end.

    Padded on the right, as training wants it: on the left, the first word would be learnt from what a padded position
    happens to hold.
    """
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    curves, gradients, told = [], [], []
    for base in (make_local(), RemoteBloomForCausalLM(here.model)):
        model = with_peft(base, make_config())
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=0.01)
        curve = []
        for step in range(5):
            loss = model(**batch, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                gradients.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
            optimizer.step()
            curve.append(float(loss.detach()))
        curves.append(curve)
        model.eval()
        prompts = tokenizer(PROMPTS, return_tensors="pt", padding=True)
        told.append(model.generate(**prompts, **SHORT, use_cache=True))
    assert relative_error(gradients[1], gradients[0]) <= 1e-5
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)
    assert curves[0][-1] < curves[0][0]
    assert torch.equal(*told)


def trained(model: Any, tokenizer: Any, directory: Path) -> list[float]:
    """Losses of three steps by the Trainer."""
    rows = [{"input_ids": row, "labels": row} for row in tokenizer(["Once there was a dragon"] * 6)["input_ids"]]
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_trains_the_same(here: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    bases = make_local(), RemoteBloomForCausalLM(here.model)
    curves = [trained(with_peft(base, prompt_tuning()), tokenizer, tmp_path) for base in bases]
    assert len(curves[0]) == 3 and curves[0][2] < curves[0][0]
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)


def test_trainer_trains_an_adapter_as_pefts_lora(here: Any, tokenizer: Any, tmp_path: Path) -> None:
    """From the same beginning, with the same words afterwards, beams included."""
    torch.manual_seed(5)
    adapter = petalite.LoraAdapter(here.model.config, rank=2, alpha=4.0, targets=["query_key_value", "dense"])
    adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make_local(), tmp_path, is_trainable=True)
    ours = RemoteBloomForCausalLM(here.model, adapter)
    curves = [trained(model, tokenizer, tmp_path) for model in (theirs, ours)]
    assert curves[0][2] < curves[0][0]
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    for options in ({}, {"num_beams": 3}):
        told = [m.eval().generate(**batch, **SHORT, use_cache=True, **options) for m in (theirs, ours)]
        assert torch.equal(*told)
    with torch.no_grad():
        states = [m(**batch, output_hidden_states=True).hidden_states[-1] for m in (theirs, ours)]
    real = batch["attention_mask"] == 1
    assert relative_error(states[1][real], states[0][real]) <= 1e-5


def test_a_classifier_learns_the_same(here: Any) -> None:
    """Its head's gradient, and the logits at the last token that is none of padding."""
    ids = torch.tensor([[40, 50, 60, 70], [3, 3, 80, 90], [100, 110, 3, 3]])
    mask = (ids != 3).long()
    theirs = BloomForSequenceClassification(copy.deepcopy(transformers_model().config)).eval()
    theirs.transformer = transformers_model().transformer
    ours = RemoteBloomForSequenceClassification(here.model, num_labels=2).eval()
    with torch.no_grad():
        ours.score.weight.copy_(theirs.score.weight)
    found = []
    for model in (theirs, ours):
        output = model(ids, attention_mask=mask, labels=torch.tensor([0, 1, 0]))
        output.loss.backward()
        found.append((output.logits, model.score.weight.grad))
    assert relative_error(found[1][0], found[0][0]) <= 1e-6
    assert relative_error(found[1][1], found[0][1]) <= 1e-5


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_is_only_on_servers_is_refused(remote: Any, here: Any) -> None:
    ids = torch.tensor([[40, 50, 60]])
    with pytest.raises(ValueError, match="attention weights stay on the servers"):
        remote(ids, output_attentions=True)
    with pytest.raises(ValueError, match="use a RemoteCache, not a DynamicCache"):
        remote(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        remote()
    with pytest.raises(ValueError, match="attention mask of shape"):
        remote(ids, attention_mask=torch.ones(1, 1, 3, 3))
    embeds = remote.get_input_embeddings()(ids).requires_grad_()
    with RemoteCache(here.model) as cache, pytest.raises(ValueError, match="no gradient flows through a cache"):
        remote(inputs_embeds=embeds, past_key_values=cache)


def test_a_cache_refuses_what_its_session_cannot_hold(remote: Any, here: Any) -> None:
    ids = torch.tensor([[40, 50, 60]])
    mask = torch.tensor([[0, 1, 1]])
    with torch.no_grad(), RemoteCache(here.model) as cache:
        remote(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match="padding behind the first step"):
            remote(ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 0]]), past_key_values=cache)
        with pytest.raises(ValueError, match="must go on without it"):
            remote(ids, past_key_values=cache, output_hidden_states=True)
        with pytest.raises(ValueError, match="cannot be cropped"):
            cache.crop(-1)
    with torch.no_grad(), RemoteCache(here.model) as cache:
        remote(ids, past_key_values=cache, output_hidden_states=True)
        with pytest.raises(ValueError, match="must go on with it"):
            remote(ids, past_key_values=cache)


def test_without_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'petalite[transformers]'")):
        runpy.run_path(str(ROOT / "petalite" / "transformers.py"))
