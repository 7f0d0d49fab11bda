"""Runs mixtures through the model tests that transformers publishes in its source distribution.

    make test-mixins
    python tests/run_transformers_mixins.py build/transformers/transformers-VERSION.tar.gz [arguments of pytest]

VERSION is the installed one; `make` downloads it. The distribution has the common tests (modeling, configuration,
training) but lacks some modules that they import. Empty classes replace these modules, so their tests do not run.
test_generation.py and test_compile_export.py test generation and exporting instead.
"""

import importlib
import json
import sys
import tarfile
import tempfile
import unittest
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CONFIGS, random_tokens
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from hf_mos import MoSConfig, MoSForCausalLM
from hf_mos.remote_code import modeling_mos

NOT_PUBLISHED = {
    "generation/test_utils.py": "class GenerationTesterMixin: pass\n",
    "exporters/test_export.py": "class ExportTesterMixin: pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


def unpack(archive: Path, folder: Path) -> Path:
    """Unpacks the tests into `folder`, puts the stand-ins beside them, and returns the package's parent folder."""
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    (root / "tests" / "__init__.py").touch()
    for path, text in NOT_PUBLISHED.items():
        file = root / "tests" / path
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            (file.parent / "__init__.py").touch()
            file.write_text(text)
    return root


def main() -> int:
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        given = sys.argv[1] if len(sys.argv) > 1 else "nothing"
        print(f"skipped: expected the path of transformers' source distribution, given {given}\n\n{__doc__}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, str(unpack(Path(sys.argv[1]), Path(folder))))
        importlib.import_module("tests.test_modeling_common")
        no_settings = ["-c", "/dev/null", "-p", "no:cacheprovider", "-W", "ignore"]  # its warnings are not ours
        return pytest.main([__file__, "-q", *no_settings, *sys.argv[2:]])


class Tester:
    """What the mixins ask of a model: a tiny config and inputs for it."""

    is_training = True
    batch_size, seq_length = 3, 7

    def __init__(self, parent: Any) -> None:
        self.parent, self.backbone = parent, parent.backbone
        config: Any = self.get_config()
        self.causal_lm_class = class_of(self.backbone)
        self.hidden_size = config.hidden_size
        self.num_hidden_layers = config.num_hidden_layers
        self.num_attention_heads = config.num_attention_heads
        self.vocab_size = config.vocab_size

    def get_config(self) -> MoSConfig:
        backbone_config = CONFIGS[self.backbone]()
        backbone_config.initializer_range = 0.02  # the tests of initialisation and training expect an untouched model
        return MoSConfig.from_backbone_config(backbone_config, num_mixtures=3)

    def prepare_config_and_inputs_for_common(self) -> tuple[MoSConfig, dict[str, Any]]:
        tokens = random_tokens(self.batch_size, self.seq_length)
        return self.get_config(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def class_of(backbone: str) -> type[MoSForCausalLM]:
    """The made class, by its name."""
    causal_lm = MODEL_FOR_CAUSAL_LM_MAPPING[type(CONFIGS[backbone]())]
    return getattr(modeling_mos, f"MoS{causal_lm.__name__}")


if "tests.test_modeling_common" in sys.modules:
    from tests.generation.test_utils import GenerationTesterMixin
    from tests.test_configuration_common import ConfigTester
    from tests.test_modeling_common import ModelTesterMixin
    from tests.test_training_mixin import TrainingTesterMixin

    class MixtureTest(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
        backbone = "llama"
        model_tester = None

        def __init_subclass__(cls) -> None:
            super().__init_subclass__()
            cls.all_model_classes = cls.all_generative_model_classes = (class_of(cls.backbone),)

        def setUp(self) -> None:
            self.model_tester = Tester(self)

        def test_config(self) -> None:
            config = self.model_tester.get_config()
            fields = json.loads(config.to_json_string())
            for name in ("model_type", "backbone_model_type", "tokenizer_without_code"):  # of the file alone
                del fields[name]
            ConfigTester(self, config_class=type(config), **fields).run_common_tests()

        @unittest.skip("a folder with the layers alone is refused, so that no head is random without a word")
        def test_correct_missing_keys(self) -> None: ...

        @unittest.skip("a folder with the layers alone is refused, so that no head is random without a word")
        def test_base_model_prefix_loads_base_weights(self) -> None: ...

    class MoSLlamaTest(MixtureTest, unittest.TestCase): ...

    class MoSTiedLlamaTest(MixtureTest, unittest.TestCase):
        backbone = "llama-tied"

    class MoSGPT2Test(MixtureTest, unittest.TestCase):
        backbone = "gpt2"

    class MoSGemma2Test(MixtureTest, unittest.TestCase):
        backbone = "gemma2"

    class MoSMixtralTest(MixtureTest, unittest.TestCase):
        backbone = "mixtral"


if __name__ == "__main__":
    sys.exit(main())
