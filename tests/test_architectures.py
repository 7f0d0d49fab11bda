"""Runs the checks of `tests/architectures.py` on a sample of architectures, and tests each special case."""

import copy
from pathlib import Path
from typing import Any

import architectures as sweep
import pytest
import torch
import transformers
from helpers import run_python
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2DoubleHeadsModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MusicgenDecoderConfig,
    MusicgenForCausalLM,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import hf_mos
from hf_mos import MoSConfig, MoSForCausalLM

# Each for what it alone has: see the comments.
SAMPLE = [
    "bart",  # a decoder whose config says encoder-decoder
    "blt",  # states its tie the other way round, and embeds bytes by hashes
    "falcon_h1",  # buffers that one module initialises in others
    "gemma4_text",  # fields that differ from layer to layer
    "git",  # an image before the text
    "inkling2_text",  # a softcap built in, a padded vocabulary
    "jetmoe",  # a balancing coefficient by another name
    "mllama",  # the text model of a composite one
    "nemotron_h",  # kinds of layers that only its own class knows
    "prophetnet",  # an embedding that is itself tied
    "recurrent_gemma",  # a softcap that may not be None, a state kept in the modules
    "roberta",  # the decoder's bias a second time
    "rwkv",  # a state in place of a cache
    "xlstm",  # a softcap in chunks
]


SAMPLE = [model_type for model_type in SAMPLE if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
needs = {
    model_type: pytest.mark.skipif(model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, reason="a newer transformers")
    for model_type in ("gemma4_unified_assistant", "inkling_text")
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("architectures")
    rows = {model_type: sweep.check(model_type, folder / model_type) for model_type in SAMPLE}
    alone = sweep.load_alone(folder / model_type / "mos" for model_type in SAMPLE)
    for model_type, row in rows.items():
        row.alone = alone[folder / model_type / "mos"]
    return rows


@pytest.mark.filterwarnings("default")  # transformers' and torch's own, about these architectures
@pytest.mark.parametrize("model_type", SAMPLE)
def test_architecture_is_whole(rows: dict[str, Any], model_type: str) -> None:
    row = rows[model_type]
    assert row.is_whole, row
    assert None not in (row.gap, row.loss_gap, row.tokens, row.trains, row.reloads), row
    assert row.alone is True, row


def test_the_checks_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(*args: Any, **kwargs: Any) -> MoSForCausalLM:
        model = from_causal_lm(*args, **kwargs)
        with torch.no_grad():
            model.lm_head.shift.weight.normal_()
        model.lm_head.prior.requires_grad_(False)
        return model

    from_causal_lm = MoSForCausalLM.from_causal_lm
    monkeypatch.setattr(sweep.MoSForCausalLM, "from_causal_lm", spoilt)
    row = sweep.check("llama", tmp_path)
    assert min(row.gap, row.loss_gap) > 0.01
    assert row.trains is False
    assert not row.is_whole
    assert any("no finite gradient: lm_head.prior.weight" in note for note in row.notes)


def tiny_gpt2(model_class: type) -> Any:
    return model_class(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: MusicgenForCausalLM(
                MusicgenDecoderConfig(
                    vocab_size=40, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2
                )
            ),
            "one nn.Linear, given MusicgenForCausalLM with ModuleList",
        ),
        (
            lambda: BartForConditionalGeneration(
                BartConfig(
                    vocab_size=40,
                    d_model=16,
                    encoder_layers=1,
                    decoder_layers=1,
                    encoder_attention_heads=2,
                    decoder_attention_heads=2,
                    encoder_ffn_dim=16,
                    decoder_ffn_dim=16,
                )
            ),
            "without an encoder, given BartForConditionalGeneration",
        ),
        (
            lambda: BertForMaskedLM(
                BertConfig(
                    vocab_size=40,
                    hidden_size=16,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    intermediate_size=16,
                )
            ),
            "given BertForMaskedLM for which that is BertLMHeadModel",
        ),
        (lambda: tiny_gpt2(GPT2DoubleHeadsModel), "given GPT2DoubleHeadsModel for which that is GPT2LMHeadModel"),
    ],
)
def test_what_has_no_one_head_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoSForCausalLM.from_causal_lm(make())


@needs["gemma4_unified_assistant"]
def test_a_drafter_is_refused() -> None:
    config = AutoConfig.for_model("gemma4_unified_assistant")
    drafter_class = AutoModelForCausalLM._model_mapping[type(config)]
    drafter = drafter_class.__new__(drafter_class)  # transformers cannot make a tiny one
    torch.nn.Module.__init__(drafter)
    drafter.config = config
    with pytest.raises(ValueError, match="forward takes labels, given Gemma4UnifiedAssistantForCausalLM"):
        MoSForCausalLM.from_causal_lm(drafter)


@pytest.fixture
def llava() -> LlavaForConditionalGeneration:
    """A vision-language model that is not in the causal-LM mapping."""
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
        "projection_dim": 16,
    }
    torch.manual_seed(0)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=60, image_seq_length=4)
    return LlavaForConditionalGeneration(config).eval()


def with_image() -> dict[str, torch.Tensor]:
    """Four image tokens between text tokens, and the image."""
    torch.manual_seed(1)
    input_ids = torch.tensor([[5, 6, 60, 60, 60, 60, 7, 8, 9]])
    return {"input_ids": input_ids, "pixel_values": torch.randn(1, 3, 16, 16)}


@torch.no_grad()
def test_images_pass_through_and_the_class_survives(llava: LlavaForConditionalGeneration, tmp_path: Path) -> None:
    batch = with_image()
    own = llava(**batch, labels=batch["input_ids"])
    model = MoSForCausalLM.from_causal_lm(llava, num_mixtures=3)
    ours = model(**batch, labels=batch["input_ids"])
    torch.testing.assert_close(ours.logits, own.logits.log_softmax(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.loss, own.loss, rtol=0, atol=1e-5)
    another = {**batch, "pixel_values": batch["pixel_values"] + 1}
    assert not torch.equal(model(**another).logits, ours.logits)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**batch, **options), llava.generate(**batch, **options))

    model.save_pretrained(tmp_path)
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        loaded = auto_class.from_pretrained(tmp_path)
        assert type(loaded) is type(model)
        assert isinstance(loaded, LlavaForConditionalGeneration)
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


READ_ALONE = """
import torch, transformers
folder, *names = sys.argv[1:]
batch, expected = torch.load("expected.pt")
for name in names:
    model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(model(**batch).logits, expected)
    print(type(model).__name__)
    model.save_pretrained(folder)
"""


@torch.no_grad()
def test_the_files_beside_a_checkpoint_let_the_same_auto_classes_load_it(
    llava: LlavaForConditionalGeneration, tmp_path: Path
) -> None:
    model = MoSForCausalLM.from_causal_lm(llava, num_mixtures=3)
    model.save_pretrained(tmp_path / "model")
    torch.save((with_image(), model(**with_image()).logits), tmp_path / "expected.pt")
    names = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    printed = run_python(READ_ALONE, tmp_path / "model", *names, cache=tmp_path)
    assert printed.split() == ["MoSLlavaForConditionalGeneration"] * 3


@pytest.mark.parametrize("model_type", ["llava", "llama", "xlm"])
def test_transformers_knows_the_class_by_name_where_it_knows_the_softmax_models(model_type: str) -> None:
    """A server and pipelines ask by name what a model reads."""
    auto_class = AutoModelForMultimodalLM if model_type == "llava" else AutoModelForCausalLM
    with torch.device("meta"):
        own = type(auto_class.from_config(sweep.tiny_config(model_type))).__name__
    made = getattr(hf_mos, f"MoS{own}").__name__
    mappings = {name: each for name, each in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")}
    known = {name for name, mapping in mappings.items() if own in mapping.values()}
    assert {name for name, mapping in mappings.items() if made in mapping.values()} == known | {
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"  # in which the Trainer sees that the labels are to be shifted
    }


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llava", "blip-2", "gemma3"])
def test_an_untied_decoder_stays_one_where_the_text_config_ties(model_type: str, tmp_path: Path) -> None:
    """A config may take the tie of its text config, and a text model inside another ties by its own."""
    config = sweep.tiny_config(model_type)
    for holder in (config, config.get_text_config()):
        holder.tie_word_embeddings = True
    original = AutoModelForImageTextToText.from_config(config)
    assert original.get_output_embeddings().weight is original.get_input_embeddings().weight
    model = MoSForCausalLM.from_causal_lm(original, tie_word_embeddings=False)
    model.tie_weights()
    model.mos_head.weight.mul_(2)
    model.save_pretrained(tmp_path)
    loaded = MoSForCausalLM.from_pretrained(tmp_path)
    loaded.resize_token_embeddings(sweep.VOCAB + 8, mean_resizing=False)  # which ties the weights again
    for candidate in (model, loaded, loaded.to_softmax()):
        decoder, embedding = candidate.get_output_embeddings().weight, candidate.get_input_embeddings().weight
        assert torch.equal(decoder[: sweep.VOCAB], 2 * embedding[: sweep.VOCAB])


@torch.no_grad()
def test_a_softcap_that_the_backbone_leaves_unread_is_left_out() -> None:
    original = sweep.tiny_original("gemma3")
    assert isinstance(original, Gemma3ForConditionalGeneration)
    assert original.config.text_config.final_logit_softcapping == 5.0
    assert MoSForCausalLM.from_causal_lm(original).mos_head.softcap is None


@torch.no_grad()
def test_a_softcap_that_may_not_be_none_in_half_precision() -> None:
    original = sweep.tiny_original("recurrent_gemma").to(torch.float16)
    batch = sweep.batch_for(original)
    expected = sweep.log_probs(original, batch)
    model = MoSForCausalLM.from_causal_lm(original)
    assert sweep.largest_gap(sweep.log_probs(model, batch), expected) < 0.05


@needs["inkling_text"]
def test_a_padded_vocabulary_is_cut_and_can_be_resized(tmp_path: Path) -> None:
    original = sweep.tiny_original("inkling_text")
    batch = sweep.batch_for(original)
    model = MoSForCausalLM.from_causal_lm(copy.deepcopy(original))
    for size, classes in ((None, 90), (104, 90)):
        for candidate in (original, model):
            if size is not None:
                candidate.resize_token_embeddings(size, mean_resizing=False)
            assert candidate.get_output_embeddings().out_features == (size or sweep.VOCAB)
        log_probs = sweep.log_probs(model, batch)
        assert log_probs.shape[-1] == classes
        assert sweep.largest_gap(log_probs, sweep.log_probs(original, batch)) < 1e-5
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 16))
        losses = [candidate(**batch, labels=batch["input_ids"]).loss for candidate in (original, model)]
        torch.testing.assert_close(losses[1], losses[0])
        model.save_pretrained(tmp_path)
        assert torch.equal(sweep.log_probs(AutoModelForCausalLM.from_pretrained(tmp_path), batch), log_probs)


SMALL: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def of_transformers(name: str, **fields: Any) -> Any:
    """A tiny model of a class that the oldest transformers may not have."""
    model_class = getattr(transformers, name, None)
    if model_class is None:
        pytest.skip("a newer transformers")
    torch.manual_seed(0)
    return model_class(model_class.config_class(**fields)).eval()


def qwen2_audio() -> Any:
    audio = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}
    audio |= {"num_mel_bins": 8, "max_source_positions": 8}
    text = SMALL | {"model_type": "qwen2"}
    return of_transformers(
        "Qwen2AudioForConditionalGeneration", audio_config=audio, text_config=text, audio_token_index=96
    )


def granite_docling() -> Any:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {
        "image_size": 32,
        "patch_size": 8,
        "out_hidden_size": 32,
        "scale_factor": 2,
        "deepstack_visual_indexes": [0],
    }
    fields = {"text_config": SMALL | {"logits_scaling": 2.0}, "vision_config": vision, "image_token_id": 96}
    return of_transformers(
        "GraniteDoclingForConditionalGeneration", **fields, pad_token_id=0, density_router_hidden_size=8
    )


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_loss_that_the_attention_mask_cuts(padding: str) -> None:
    original = qwen2_audio()
    batch = sweep.batch_for(original)
    hidden = (0, slice(5)) if padding == "left" else (1, slice(-4, None))
    batch["attention_mask"][hidden] = 0
    labels = batch["input_ids"]
    model = MoSForCausalLM.from_causal_lm(original, num_mixtures=3)
    own = original(**batch, labels=labels).loss
    assert own != original(**batch | {"attention_mask": torch.ones_like(labels)}, labels=labels).loss
    for candidate in (model.eval(), model.train()):
        torch.testing.assert_close(candidate(**batch, labels=labels).loss, own)


def test_a_loss_that_the_layers_add() -> None:
    """A router's, which they compute from labels of its own."""
    original = granite_docling()
    tokens = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": tokens.index_fill(1, torch.arange(4), 96), "router_labels": torch.ones(2)}
    given |= {"pixel_values": torch.randn(2, 1, 3, 32, 32), "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool)}
    model = MoSForCausalLM.from_causal_lm(original, num_mixtures=3)
    for labels in ({}, {"labels": tokens}):
        loss = model(**given, **labels).loss
        torch.testing.assert_close(loss, original(**given, **labels).loss)
    loss.backward()
    assert any(weight.grad is not None for name, weight in model.named_parameters() if "router" in name)


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("bamba", {"z_loss_coefficient": 0.01}, "z_loss_coefficient: expected 0, given 0.01"),
        ("prophetnet", {"disable_ngram_loss": False}, "disable_ngram_loss: expected True, given False"),
    ],
)
def test_a_loss_of_all_logits_is_refused(model_type: str, fields: dict[str, Any], message: str) -> None:
    config = sweep.tiny_config(model_type)
    for name, value in fields.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=message):
        MoSForCausalLM.from_causal_lm(model)


def test_logits_of_further_tokens_are_left_out() -> None:
    original = sweep.tiny_original("prophetnet")
    batch = sweep.batch_for(original)
    assert original(**batch).logits_ngram is not None
    assert MoSForCausalLM.from_causal_lm(original)(**batch).logits_ngram is None


def test_a_new_model_of_a_composite_config_reloads(tmp_path: Path) -> None:
    model = MoSForCausalLM(MoSConfig.from_backbone_config(sweep.tiny_config("mllama"), num_mixtures=2)).eval()
    batch = sweep.batch_for(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(sweep.log_probs(loaded, batch), sweep.log_probs(model, batch))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")  # the word of all versions
def test_checkpointing_agrees() -> None:
    model = MoSForCausalLM.from_causal_lm(sweep.tiny_original("git"), num_mixtures=2).train()
    batch = sweep.batch_for(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.gradient_checkpointing_enable()
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name])


def test_the_configs_use_cache_is_read() -> None:
    model = MoSForCausalLM.from_causal_lm(sweep.tiny_original("llama"), num_mixtures=2)
    model.config.use_cache = False
    assert model(torch.tensor([[5, 6]])).past_key_values is None
