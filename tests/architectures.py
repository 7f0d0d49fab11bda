"""Converts and checks every causal LM architecture of transformers, with tiny random weights.

    python tests/architectures.py                      # all, on two processes
    python tests/architectures.py --only llama --only mamba
    python tests/architectures.py --markdown tests/architectures.md --json architectures.json

For each model type of transformers' causal-LM mapping: build a tiny original, convert it with
`MoSForCausalLM.from_causal_lm`, and ask of the result

    gap       largest difference of log-probability to the original in fp32, converted in memory to the full mixture
              and to one on a shortlist, and from a folder to the default
    loss gap  difference of the loss to the original's own, with and without a mixture-of-experts backbone's `aux_loss`
    tokens    greedy generation with the cache gives the original's tokens
    trains    the loss falls, every parameter of the head gets a finite gradient, and all others get theirs
    reloads   saved and loaded by `AutoModelForCausalLM.from_pretrained`, the logits are equal, bit for bit
    alone     the same in a process that cannot import hf_mos (`trust_remote_code=True`)

A property is asked only where the original has it: the original is run first, and its own failure is the note in the
table. A gap of more than 1e-5, and a property that is asked and missing, make the exit status 1.
"""

import dataclasses
import inspect
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
import transformers
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_mos import MoSForCausalLM
from hf_mos.tools.places import write_whole

VOCAB = 96
HEADS: list[dict[str, Any]] = [{"shortlist_size": None}, {"shortlist_size": 16}]
TOLERANCE = 1e-5
SECONDS = 120  # for one architecture

# ------------------------------------------------------------------------------------------------------ tiny originals

# value: the config fields that get it, in the top config and the nested ones, where the default is larger.
SIZES = {
    1: "topk_group n_group num_expert_group n_groups mamba_n_groups mamba_ngroups o_groups first_k_dense_replace "
    "num_nextn_predict_layers",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers depth num_blocks num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k",
    4: "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_key_heads "
    "linear_num_value_heads index_n_heads n_routed_experts num_experts num_local_experts moe_num_experts "
    "mamba_n_heads mamba_num_heads hc_lowrank",
    8: "head_dim d_head dim_head rotary_dim qk_rope_head_dim qk_nope_head_dim v_head_dim linear_head_dim "
    "linear_key_head_dim linear_value_head_dim swa_head_dim index_head_dim index_topk kv_channels",
    16: "kv_lora_rank q_lora_rank o_lora_rank qk_head_dim laurel_rank hidden_size_per_layer_input mamba_d_state "
    "mamba_d_head mamba_head_dim state_size ssm_state_size router_hidden_size time_step_rank moe_intermediate_size",
    32: "hidden_size n_embd d_model emb_dim embed_dim embedding_dim embedding_size out_hidden_size hidden_size_global",
    48: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim ffn_hidden_size d_ff dff dim_ff d_inner "
    "feed_forward_size expert_ffn_hidden_size intermediate_size_mlp moe_shared_expert_intermediate_size "
    "shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size "
    "dense_intermediate_size ext_pw_out_channel depthwise_separable_out_channel nemo_conv_channels mlp_dim "
    "output_channels adapter_out_dim",
    64: "max_position_embeddings n_positions n_ctx max_source_positions max_target_positions max_seq_len "
    "context_length mamba_d_ssm",
    VOCAB: "vocab_size vocab_size_per_layer_input pronunciation_vocab_size shape_vocab_size decoder_vocab_size",
}
SIZES = {field: value for value, fields in SIZES.items() for field in fields.split()}
# Fields with one entry per layer: each kind that the default config has is given a layer.
PER_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types")

# What an architecture does to its logits, so strong that it cannot be overlooked.
LOGITS = {
    "final_logit_softcapping": 5.0,
    "logits_soft_cap": 5.0,
    "output_logit_soft_cap": 5.0,
    "logit_scale": 0.5,
    "logits_scaling": 2.0,
    "lm_head_multiplier": 0.5,
    "lm_head_bias": True,
}

DOTS3 = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
GEMMA3N = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "intermediate_size": 48,
}
QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
# What the generic sizes do not make whole.
PECULIAR: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"num_hidden_layers": 2, "encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": DOTS3,
    "electra": {"embedding_size": 24},
    "gemma3n": {"text_config": GEMMA3N},
    "gemma3n_text": GEMMA3N,
    "gemma4": {"text_config": {"global_head_dim": 16}},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gemma4_unified": {"text_config": {"global_head_dim": 16}},
    "gemma4_unified_text": {"global_head_dim": 16},
    "git": {"vision_config": {"image_size": 32}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "inkling2_text": {"swa_num_key_value_heads": 2, "unpadded_vocab_size": 90},
    "inkling_text": {"swa_num_key_value_heads": 2, "unpadded_vocab_size": 90},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "minicpm3": {"dim_model_base": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "prophetnet": {"disable_ngram_loss": True},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False},
    "roformer": {"embedding_size": 24},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}
# What a config class asks for before it makes a default config at all.
REQUIRED = {
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
}


def tiny_fields(config: PreTrainedConfig, peculiar: dict[str, Any]) -> dict[str, Any]:
    """The arguments that make a config of this class tiny."""
    default = vars(config)
    fields: dict[str, Any] = {}
    for name, value in default.items():
        if isinstance(value, PreTrainedConfig):
            fields[name] = type(value)(**tiny_fields(value, peculiar.get(name, {})))
        elif name.endswith(("_token_id", "_token_index")) and value is not None:
            fields[name] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, 3)
        elif name in SIZES and isinstance(value, int) and value > SIZES[name]:
            fields[name] = SIZES[name]
        elif name in LOGITS:
            fields[name] = LOGITS[name]
    kinds = {name: list(dict.fromkeys(default[name])) for name in PER_LAYER if isinstance(default.get(name), list)}
    layers = max([2, *map(len, kinds.values())])
    for name, values in kinds.items():
        fields["num_hidden_layers"] = layers
        fields[name] = (values * layers)[:layers]
    if default.get("num_key_value_heads") is not None:
        grouped = default["num_key_value_heads"] != default.get("num_attention_heads")
        fields["num_key_value_heads"] = 2 if grouped else 4
    if default.get("is_decoder") is False:
        fields["is_decoder"] = True
    nested = {name for name in fields if isinstance(default.get(name), PreTrainedConfig)}
    return {**fields, **{name: value for name, value in peculiar.items() if name not in nested}}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A config of the type that builds in a moment."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class(**REQUIRED.get(model_type, {}))
    return config_class(**tiny_fields(default, PECULIAR.get(model_type, {})))


def tiny_original(model_type: str) -> PreTrainedModel:
    """A causal LM of the type with weights so strong that its greedy choices are no ties."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.get_input_embeddings().weight.normal_()
    return model.eval()


# ------------------------------------------------------------------------------------------------------------- checks

# Decoders of encoder-decoder models and others whose own loss does not shift the labels. The mixture's does, for all.
UNSHIFTED = {
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "cpmant", "marian", "mbart", "mvp", "pegasus"),
    *("plbart", "prophetnet", "trocr", "whisper", "xlm", "xlnet"),
}


@dataclasses.dataclass
class Row:
    """The findings for one architecture; `None`: not checked, as the original lacks the property."""

    model_type: str
    model_class: str
    gap: float | None = None
    loss_gap: float | None = None
    tokens: bool | None = None
    trains: bool | None = None
    reloads: bool | None = None
    alone: bool | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    refusal: str | None = None  # from_causal_lm's ValueError
    error: str | None = None  # a crash that is not the original's
    seconds: float = 0.0

    @property
    def is_built(self) -> bool:
        return self.gap is not None or self.refusal is not None or self.error is not None

    @property
    def is_whole(self) -> bool:
        gaps = all(gap <= TOLERANCE for gap in (self.gap, self.loss_gap) if gap is not None)
        return self.error is None and gaps and False not in (self.tokens, self.trains, self.reloads, self.alone)


def batch_for(model: PreTrainedModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(4, 90, (2, 16), generator=generator)
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if model.config.model_type == "git":  # its loss counts on an image before the text
        batch["pixel_values"] = torch.randn(2, 3, 32, 32, generator=generator)
    return batch


@torch.no_grad()
def log_probs(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits.float().log_softmax(-1)


def largest_gap(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference; infinite where the shapes or the finite entries are not the same."""
    if ours.shape != theirs.shape or not torch.equal(ours.isfinite(), theirs.isfinite()):
        return float("inf")
    return (ours - theirs)[theirs.isfinite()].abs().max().item()


def greedy_tokens(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    return model.generate(
        **batch, max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=1, use_cache=True, pad_token_id=0
    )


def loss_of(model: PreTrainedModel, batch: dict[str, Tensor], labels: Tensor, router: bool = False) -> Tensor:
    """The loss; with `router` the balancing loss of a mixture of experts is in it."""
    return model(**batch, labels=labels, **({"output_router_logits": True} if router else {})).loss


def train(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[list[float], dict[str, Tensor | None]]:
    """The losses of some steps on one batch, and the gradients of the last step, when the components differ."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    losses: list[float] = []
    gradients: dict[str, Tensor | None] = {}
    for step in range(5):
        torch.manual_seed(step)
        loss = loss_of(model, batch, batch["input_ids"])
        loss.backward()
        losses.append(loss.item())
        gradients = {
            name: None if parameter.grad is None else parameter.grad.clone()
            for name, parameter in model.named_parameters()
        }
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return losses, gradients


def reason(error: BaseException) -> str:
    """One line of an error, and where it was raised."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:120]
    return f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"


class Asked:
    """Runs a probe on the original; its failure is noted, and the property is then not asked of the mixture."""

    def __init__(self, row: Row) -> None:
        self.row = row

    def __call__(self, what: str, probe: Callable[[], Any]) -> Any:
        try:
            return probe()
        except Exception as error:
            self.row.notes.append(f"the original does not {what}: {reason(error)}")
            return None


def check(model_type: str, folder: Path) -> Row:
    """Everything but `alone`, for which a checkpoint and the logits expected of it are left in `folder`."""
    start = time.perf_counter()
    row = Row(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    asked = Asked(row)
    original = asked("build", lambda: tiny_original(model_type))
    if original is not None:
        batch = batch_for(original)
        expected = asked("run", lambda: log_probs(original, batch))
        if expected is not None:
            try:
                compare(row, asked, original, batch, expected, folder)
            except Exception as error:
                row.error = reason(error)
    row.seconds = time.perf_counter() - start
    return row


def compare(
    row: Row, asked: Asked, original: PreTrainedModel, batch: dict[str, Tensor], expected: Tensor, folder: Path
) -> None:
    own_tokens = asked("generate", lambda: greedy_tokens(original, batch))
    labels = batch["input_ids"]
    own_labels = F.pad(labels[:, 1:], (0, 1), value=-100) if row.model_type in UNSHIFTED else labels
    own_loss = asked("compute its loss", lambda: loss_of(original, batch, own_labels).item())
    own_router_loss = None
    if "output_router_logits" in inspect.signature(original.forward).parameters:
        own_router_loss = asked(
            "compute its balancing loss", lambda: loss_of(original, batch, own_labels, router=True).item()
        )
    own_config = original.config.to_dict()

    for options in HEADS:
        try:
            model = MoSForCausalLM.from_causal_lm(original, num_mixtures=3, **options)
        except ValueError as refusal:
            row.refusal = str(refusal)
            return
        row.gap = max(row.gap or 0.0, largest_gap(log_probs(model, batch), expected))
        if own_tokens is not None:
            row.tokens = row.tokens is not False and torch.equal(greedy_tokens(model, batch), own_tokens)
        if own_loss is not None:
            row.loss_gap = max(row.loss_gap or 0.0, abs(loss_of(model, batch, labels).item() - own_loss))
        if own_router_loss is not None:
            router_loss = loss_of(model, batch, labels, router=True).item()
            row.loss_gap = max(row.loss_gap or 0.0, abs(router_loss - own_router_loss))
    if not torch.equal(log_probs(original, batch), expected) or original.config.to_dict() != own_config:
        row.error = "the model that was converted is not what it was"

    own_folder = folder / "original"
    if asked("save and load", lambda: saved_and_loaded(original, own_folder, batch, expected)):
        row.gap = max(row.gap, largest_gap(log_probs(MoSForCausalLM.from_causal_lm(own_folder), batch), expected))

    own_training = asked("train", lambda: train(tiny_original(row.model_type), batch))
    if own_training is not None:
        losses, gradients = train(model, batch)
        new = {id(parameter) for parameter in model.mos_head.parameters()}
        head = [name for name, parameter in model.named_parameters() if id(parameter) in new]
        row.trains = trains(losses, gradients, own_training[1], head, row.notes)
    if own_folder.exists():
        row.reloads = reloads(model, folder / "mos", batch)


def saved_and_loaded(model: PreTrainedModel, folder: Path, batch: dict[str, Tensor], expected: Tensor) -> bool:
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    gap = largest_gap(log_probs(loaded, batch), expected)
    if gap > TOLERANCE:
        raise ValueError(f"its own log-probabilities change by {gap:.1e}")
    return True


def trains(
    losses: list[float],
    gradients: dict[str, Tensor | None],
    own_gradients: dict[str, Tensor | None],
    head: list[str],
    notes: list[str],
) -> bool:
    """The loss falls, the gradients of the head's parameters are all there, and others where the original's are."""
    bad = [name for name in head if (gradient := gradients[name]) is None or not gradient.isfinite().all()]
    zero = [name for name in head if (gradient := gradients[name]) is not None and not gradient.any()]
    lost = [name for name, gradient in gradients.items() if gradient is None and own_gradients.get(name) is not None]
    for what, names in (("no finite gradient", bad), ("zero gradient", zero), ("lost gradient", lost)):
        if names:
            notes.append(f"{what}: {', '.join(names)}")
    if not losses[-1] < losses[0]:
        notes.append(f"losses {losses}")
    return not (bad or zero or lost) and losses[-1] < losses[0]


def realign(model: PreTrainedModel) -> PreTrainedModel:
    """Copies the weights: loaded ones are views of the file, at addresses for which some kernels round otherwise."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def reloads(model: MoSForCausalLM, folder: Path, batch: dict[str, Tensor]) -> bool:
    """Saves the model, and beside it the batch and the logits; whether it loads with these very logits."""
    with torch.no_grad():
        logits = model(**batch).logits
    model.save_pretrained(folder)
    torch.save({"batch": batch, "logits": logits}, folder / "expected.pt")
    loaded = realign(AutoModelForCausalLM.from_pretrained(folder))
    with torch.no_grad():
        return torch.equal(loaded(**batch).logits, logits)


# A process that cannot import hf_mos loads the folders that it is given, and prints one line of JSON for each.
ALONE = """
import json, sys, warnings
warnings.simplefilter("ignore")
sys.modules["hf_mos"] = None
import torch, transformers
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    try:
        expected = torch.load(folder + "/expected.pt")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        with torch.no_grad():
            outcome = torch.equal(model(**expected["batch"]).logits, expected["logits"])
    except Exception as error:
        outcome = repr(error)
    print(json.dumps([folder, outcome]), flush=True)
"""


def load_alone(folders: Iterable[Path]) -> dict[Path, bool | str]:
    """For each folder whether it gave its logits where hf_mos cannot be imported, or the error."""
    outcomes: dict[Path, bool | str] = {}
    with tempfile.TemporaryDirectory() as cache:
        process = subprocess.run(
            [sys.executable, "-c", ALONE, *map(str, folders)],
            env={**os.environ, "HF_MODULES_CACHE": cache},
            cwd=cache,
            capture_output=True,
            text=True,
        )
    for line in process.stdout.splitlines():
        if line.startswith("["):
            folder, outcome = json.loads(line)
            outcomes[Path(folder)] = outcome
    return outcomes


# -------------------------------------------------------------------------------------------------------------- sweep


def check_quietly(model_type: str, folder: Path, results: Any) -> None:
    """A worker process: one architecture, its row sent as it ends."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    results.send(check(model_type, folder))


def check_apart(model_type: str, folder: Path) -> Row:
    """Runs `check` in its own process, so that a crash or a hang affects only one row."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=check_quietly, args=(model_type, folder, sender))
    process.start()
    sender.close()
    row = Row(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    try:
        if receiver.poll(SECONDS):
            row = receiver.recv()
        else:
            row.error = f"no answer in {SECONDS} s"
    except EOFError:
        process.join()
        row.error = f"the process ended with status {process.exitcode}"
    process.kill()
    process.join()
    return row


def sweep(model_types: list[str], folder: Path, workers: int) -> list[Row]:
    multiprocessing.get_context("forkserver").set_forkserver_preload(["hf_mos"])
    console = Console(stderr=True)
    pool = ThreadPoolExecutor(workers)
    try:
        checks = [pool.submit(check_apart, model_type, folder / model_type) for model_type in model_types]
        rows = [done.result() for done in track(as_completed(checks), "Checking", len(checks), console=console)]
        rows.sort(key=lambda row: row.model_type)
        saved = [row for row in rows if row.reloads]
        parts = [[folder / row.model_type / "mos" for row in saved[part::workers]] for part in range(workers)]
        alone: dict[Path, bool | str] = {}
        for outcomes in track(pool.map(load_alone, parts), "Loading without hf_mos", len(parts), console=console):
            alone.update(outcomes)
    finally:
        pool.shutdown(cancel_futures=True)
    for row in saved:
        outcome = alone.get(folder / row.model_type / "mos", "the process ended before")
        row.alone = outcome is True
        if isinstance(outcome, str):
            row.notes.append(f"alone: {outcome}")
    return rows


COLUMNS = ("model type", "class", "gap", "loss gap", "tokens", "trains", "reloads", "alone", "notes")


def cells(row: Row) -> list[str]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.0e}"

    def mark(value: bool | None) -> str:
        return {True: "yes", False: "NO", None: ""}[value]

    notes = [*row.notes]
    if row.refusal:
        notes.insert(0, f"refused: {row.refusal}")
    if row.error:
        notes.insert(0, f"ERROR: {row.error}")
    marks = (mark(value) for value in (row.tokens, row.trains, row.reloads, row.alone))
    return [row.model_type, row.model_class, number(row.gap), number(row.loss_gap), *marks, "; ".join(notes)]


def closing_line(rows: list[Row]) -> str:
    built = [row for row in rows if row.is_built]
    refused = [row for row in built if row.refusal]
    whole = [row for row in built if row.is_whole and not row.refusal]
    gap = max((row.gap for row in whole if row.gap is not None), default=0.0)
    return (
        f"{len(whole)} of {len(built)} architectures that transformers {transformers.__version__} builds and runs are "
        f"whole (largest gap {gap:.1e}), {len(refused)} refused, {len(built) - len(whole) - len(refused)} broken; "
        f"{len(rows) - len(built)} of {len(rows)} cannot be built or run."
    )


def markdown(rows: list[Row]) -> str:
    """The document, with the command that reprints it."""
    table = [COLUMNS, ["---"] * len(COLUMNS), *(cells(row) for row in rows)]
    lines = ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in table]
    about = __doc__.split("\n\n")
    return "\n\n".join(
        [
            "# Architectures",
            closing_line(rows),
            "Reprinted by `python tests/architectures.py --markdown tests/architectures.md`. Each model type of "
            "transformers' causal-LM mapping is built tiny with random weights and converted.",
            f"```text\n{about[3]}\n```",
            about[4].strip(),
            "\n".join(lines) + "\n",
        ]
    )


def main(
    only: Annotated[list[str] | None, typer.Option(help="A model type; may be given more than once.")] = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Writes the table there.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Writes the rows there.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = 2,
) -> None:
    """Converts and checks every causal LM architecture of transformers."""
    known = [name for name, made in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if not made.startswith("MoS")]
    unknown = sorted(set(only or ()) - set(known))
    if unknown:
        raise typer.BadParameter(f"expected model types of transformers' causal-LM mapping, given {unknown}")
    with tempfile.TemporaryDirectory() as folder:
        rows = sweep(only or known, Path(folder), workers)
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*cells(row))
    Console(width=220).print(table)
    print(closing_line(rows))
    if markdown_file:
        write_whole(markdown_file, lambda file: file.write_text(markdown(rows)))
    if json_file:
        found = json.dumps([dataclasses.asdict(row) for row in rows], indent=1)
        write_whole(json_file, lambda file: file.write_text(found))
    raise typer.Exit(any(not row.is_whole for row in rows if row.is_built))


if __name__ == "__main__":
    typer.run(main)
