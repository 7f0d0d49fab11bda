"""Checks that a checkpoint is safetensors with code beside it, and loads as the same model everywhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BACKBONES, HEADS, greedy, log_prob_gap, random_tokens, run_python, tiny_causal_lm, tiny_mos
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_mos import MoSConfig, MoSForCausalLM, remote_code

CODE_FILES = {path.name for path in Path(remote_code.__path__[0]).glob("*.py")} - {"__init__.py"}


def assert_same_weights(model: PreTrainedModel, other: PreTrainedModel) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype, key
        assert torch.equal(tensor, theirs[key]), key


def fields(config: MoSConfig) -> dict:
    """The content of the config's file without what a loaded model adds."""
    added = {"transformers_version", "_name_or_path", "dtype", "architectures", "auto_map"}
    return {key: value for key, value in json.loads(config.to_json_string(use_diff=False)).items() if key not in added}


def stored_keys(path: Path) -> set[str]:
    with safe_open(path, "pt") as weights:
        return set(weights.keys())


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("name", [*BACKBONES, "bert", "cohere", "gpt_neox"])
def test_saved_and_loaded_is_the_same(name: str, head: dict, tmp_path: Path) -> None:
    model = tiny_mos(name, **head)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info.values())
    assert_same_weights(model, loaded)
    assert fields(loaded.config) == fields(model.config)
    tokens = random_tokens()
    assert log_prob_gap(model, loaded, input_ids=tokens) == 0
    assert torch.equal(greedy(model, tokens), greedy(loaded, tokens))


@pytest.mark.parametrize("name", BACKBONES)
def test_files_of_a_checkpoint(name: str, tmp_path: Path) -> None:
    model = tiny_mos(name)
    model.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == CODE_FILES | {"config.json", "generation_config.json", "model.safetensors"}
    assert all(Path(file).suffix in {".py", ".json", ".safetensors"} for file in files)
    is_tied = model.lm_head.weight is model.get_input_embeddings().weight
    softmax_folder = tmp_path / "softmax"
    tiny_causal_lm(name).save_pretrained(softmax_folder)
    keys = stored_keys(tmp_path / "model.safetensors")
    assert keys == stored_keys(softmax_folder / "model.safetensors") | {
        "lm_head.prior.weight",
        "lm_head.shift.weight",
    }
    assert ("lm_head.weight" in keys) is not is_tied
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_mos.MoSConfig",
        "AutoModelForCausalLM": f"modeling_mos.{type(model).__name__}",
    }
    softmax_config = json.loads((softmax_folder / "config.json").read_text())
    assert config["architectures"] == [f"MoS{softmax_config['architectures'][0]}"]
    assert config["model_type"] == "mos"
    assert config["backbone_model_type"] == softmax_config["model_type"]
    own = {
        "num_mixtures",
        "shortlist_size",
        "shift_rank",
        "latent_scale",
        "init_seed",
        "auto_map",
        "backbone_model_type",
    }
    assert own <= config.keys() - softmax_config.keys()
    assert config["num_mixtures"] == 3
    assert config["shortlist_size"] == 64
    assert config["latent_scale"] == 10.0


WITHOUT_HF_MOS = """
import torch
from pathlib import Path
from typing import Any
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoConfig

root, source, target = (Path(argument) for argument in sys.argv[1:])
try:
    import hf_mos
except ImportError:
    print("hf_mos cannot be imported")
tokens = torch.arange(3, 15).view(2, 6)
for name in ("llama", "llama-tied", "gpt2", "gemma2"):
    model = AutoModelForCausalLM.from_pretrained(root / source / name, trust_remote_code=True)
    assert AutoConfig.from_pretrained(root / source / name, trust_remote_code=True).num_mixtures == 3
    assert type(model).__module__.startswith("transformers_modules")
    generated = model.generate(tokens, max_new_tokens=6, do_sample=False)
    model.save_pretrained(root / target / name)
    before, after = (load_file(root / folder / name / "model.safetensors") for folder in (source, target))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)
    first = model(tokens, labels=tokens).loss
    first.backward()
    optimizer.step()
    second = model(tokens, labels=tokens).loss
    assert second < first, (first, second)
    print(name, generated.tolist(), first.item())
"""


def test_loads_generates_trains_and_saves_without_hf_mos(tmp_path: Path) -> None:
    tokens = torch.arange(3, 15).view(2, 6)
    expected = ["hf_mos cannot be imported"]
    for name in ("llama", "llama-tied", "gpt2", "gemma2"):
        model = tiny_mos(name)
        model.save_pretrained(tmp_path / "first" / name)
        generated = greedy(model, tokens, 6).tolist()
        loss = model.train()(tokens, labels=tokens).loss.item()
        expected.append(f"{name} {generated} {loss}")
    for source, target in (("first", "second"), ("second", "third")):
        cache = tmp_path / f"cache of {target}"
        cache.mkdir()
        is_first = source == "first"  # in a process that shares nothing at all
        printed = run_python(WITHOUT_HF_MOS, tmp_path, source, target, cache=cache, shares_imports=not is_first)
        assert printed.splitlines() == expected
    for name in ("llama", "llama-tied"):
        assert_same_weights(tiny_mos(name), AutoModelForCausalLM.from_pretrained(tmp_path / "third" / name))


def test_the_tokenizer_beside_a_checkpoint_needs_no_code(tmp_path: Path) -> None:
    """It is loaded without a word where the code of the checkpoint may not run."""
    folder, cache = tmp_path / "model", tmp_path / "cache"
    cache.mkdir()
    tiny_mos().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<s>").save_pretrained(folder)
    code = """
import logging
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging
said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
transformers_logging.add_handler(handler)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=False)
print(tokenizer("b a").input_ids, said, [name for name in sys.modules if name.startswith("transformers_modules")])
"""
    assert run_python(code, folder, cache=cache) == "[2, 1] [] []\n"
    assert "tokenizer_without_code" not in vars(MoSConfig.from_pretrained(folder))


def test_needs_no_trust_where_hf_mos_is_imported(tmp_path: Path) -> None:
    tiny_mos().save_pretrained(tmp_path)
    cache = tmp_path / "cache"
    cache.mkdir()
    code = """
import hf_mos
from transformers import AutoConfig, AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])) is hf_mos.MoSLlamaForCausalLM)
print(isinstance(AutoConfig.from_pretrained(sys.argv[1]), hf_mos.MoSConfig))
"""
    assert run_python(code, tmp_path, cache=cache, without_hf_mos=False).split() == ["True", "True"]


def test_package_and_remote_code_live_in_one_process(tmp_path: Path) -> None:
    model = tiny_mos("llama-tied")
    model.save_pretrained(tmp_path / "mine")
    tokens = random_tokens()
    cache = tmp_path / "cache"
    cache.mkdir()
    code = """
import torch
from pathlib import Path
from typing import Any
import hf_mos
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

root = Path(sys.argv[1])
remote_class = get_class_from_dynamic_module("modeling_mos.MoSForCausalLM", str(root / "mine"))
assert not issubclass(remote_class, hf_mos.MoSForCausalLM)
tokens = torch.arange(3, 15).view(2, 6)
package = hf_mos.MoSForCausalLM.from_pretrained(root / "mine")
remote = remote_class.from_pretrained(root / "mine")
assert isinstance(package, hf_mos.MoSForCausalLM) and not isinstance(remote, hf_mos.MoSForCausalLM)
assert not isinstance(remote.config, hf_mos.MoSConfig)
trusted = AutoModelForCausalLM.from_pretrained(root / "mine", trust_remote_code=True)
for model in (package, remote, trusted):
    assert torch.equal(model(tokens).logits, package(tokens).logits)
    model.train()(tokens, labels=tokens).loss.backward()
    model.save_pretrained(root / "again")
    assert type(AutoModelForCausalLM.from_pretrained(root / "again")) is hf_mos.MoSLlamaForCausalLM
    assert isinstance(AutoConfig.from_pretrained(root / "again"), hf_mos.MoSConfig)
# A config of the one class makes a model of the other.
assert hf_mos.MoSForCausalLM(remote.config).lm_head.num_mixtures == 3
assert remote_class(package.config).lm_head.num_mixtures == 3
"""
    run_python(code, tmp_path, cache=cache, without_hf_mos=False)
    assert log_prob_gap(MoSForCausalLM.from_pretrained(tmp_path / "again"), model, input_ids=tokens) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BACKBONES)
def test_half_precision_keeps_the_prior_in_fp32(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_mos(name)
    model.save_pretrained(tmp_path / "single")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "single", dtype=dtype)
    tiny_causal_lm(name).save_pretrained(tmp_path / "original")
    converted = MoSForCausalLM.from_causal_lm(tmp_path / "original", num_mixtures=3, dtype=dtype)
    for half in (loaded, converted):
        half.save_pretrained(tmp_path / "half")
        for candidate in (half, AutoModelForCausalLM.from_pretrained(tmp_path / "half")):
            assert candidate.dtype == dtype
            assert str(candidate.config.dtype) in str(dtype)
            assert candidate.lm_head.prior.weight.dtype == torch.float32
            assert candidate.lm_head.shift.weight.dtype == candidate.lm_head.weight.dtype == dtype
            outputs = candidate(input_ids=random_tokens(), labels=random_tokens())
            assert outputs.logits.dtype == outputs.loss.dtype == torch.float32
    assert torch.equal(loaded.lm_head.prior.weight, model.lm_head.prior.weight)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral"])
def test_shards(name: str, tmp_path: Path) -> None:
    model = tiny_mos(name)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_variant_and_subfolder(tmp_path: Path) -> None:
    model = tiny_mos("llama-tied")
    model.save_pretrained(tmp_path / "inner", variant="fp32")
    assert (tmp_path / "inner" / "model.fp32.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="inner", variant="fp32")
    assert_same_weights(model, loaded)


def test_a_state_dict_can_be_given(tmp_path: Path) -> None:
    model, other = tiny_mos("llama-tied"), tiny_mos("llama-tied", seed=3)
    model.save_pretrained(tmp_path, state_dict=other.state_dict())
    assert_same_weights(other, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_save_original_format_can_be_asked_for(tmp_path: Path) -> None:
    model = tiny_mos("mixtral")
    for choice in (True, False):
        model.save_pretrained(tmp_path / str(choice), save_original_format=choice)
        assert_same_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path / str(choice)))


def test_a_checkpoint_without_its_head_is_refused(tmp_path: Path) -> None:
    model = tiny_mos()
    state = {key: value for key, value in model.state_dict().items() if "lm_head.prior" not in key}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lm_head\.prior\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_of_another_head_is_refused(tmp_path: Path) -> None:
    tiny_mos(num_mixtures=3).save_pretrained(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=r"lm_head\.|size"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_mixtures=5)


def test_options_can_be_changed_at_loading(tmp_path: Path) -> None:
    tiny_mos().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, shortlist_size=None, attention_dropout=0.3, attn_implementation="eager"
    )
    assert model.config.shortlist_size is model.lm_head.shortlist_size is None
    assert model.config.attention_dropout == 0.3
    assert model.config._attn_implementation == "eager"
    model = MoSForCausalLM.from_pretrained(tmp_path, shortlist_size=7, latent_scale=2.0)
    for owner in (model.config, model.lm_head):
        assert (owner.num_mixtures, owner.shortlist_size, owner.latent_scale) == (3, 7, 2.0)


@pytest.mark.parametrize(("name", "value"), [("shortlist_size", None), ("latent_scale", 0.5)])
@pytest.mark.parametrize("place", ["head", "config"])
def test_an_option_that_the_head_does_not_have_is_not_saved(place: str, name: str, value: Any, tmp_path: Path) -> None:
    """The checkpoint would be loaded as another mixture than the one in memory."""
    model = tiny_mos(shortlist_size=7)
    setattr(model.lm_head if place == "head" else model.config, name, value)
    with pytest.raises(ValueError, match=f"{name}: expected .* in the config, as in the head, given"):
        model.save_pretrained(tmp_path)
    setattr(model.config if place == "head" else model.lm_head, name, value)
    model.save_pretrained(tmp_path)
    assert log_prob_gap(AutoModelForCausalLM.from_pretrained(tmp_path), model, input_ids=random_tokens()) == 0


def test_a_config_survives_its_file(tmp_path: Path) -> None:
    for name in BACKBONES:
        config = tiny_mos(name, shortlist_size=7, num_mixtures=5).config
        config.save_pretrained(tmp_path)
        for loaded in (AutoConfig.from_pretrained(tmp_path), MoSConfig.from_pretrained(tmp_path)):
            assert fields(loaded) == fields(config)
            assert type(loaded) is type(config)
            assert isinstance(loaded, type(tiny_causal_lm(name).config))


def test_a_new_model_from_a_config() -> None:
    for name in BACKBONES:
        config = tiny_mos(name).config
        model = AutoModelForCausalLM.from_config(config)
        assert type(model) is type(tiny_mos(name))
        assert model(input_ids=random_tokens()).logits.exp().sum(-1).sub(1).abs().max() < 1e-4
