"""Imports a module of this package after another module, so that `import hf_mos` imports no torch or transformers.

What this package adds to transformers and to the code that travels comes with the module that it adds to. So it is
there whatever is imported first: `AutoModelForCausalLM`, `hf_mos.MoSForCausalLM`, or a module that a pickle names.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

REMOTE = "hf_mos.remote_code"
AUTO_CONFIG = "transformers.models.auto.configuration_auto"
FOLLOWERS: dict[str, tuple[str, ...]] = {
    AUTO_CONFIG: (f"{REMOTE}.configuration_mos",),
    f"{REMOTE}.configuration_mos": ("hf_mos.auto_classes",),
    f"{REMOTE}.mos_loss": ("hf_mos.training.compiled_loss",),
    f"{REMOTE}.mos_head": ("hf_mos.training.adapters", "hf_mos.training.tensor_parallel"),
    f"{REMOTE}.modeling_mos": ("hf_mos.conversion", "hf_mos.training.fsdp", "hf_mos.training.token_scores"),
}


class AfterImport(MetaPathFinder):
    """Finds the modules of `FOLLOWERS` as Python itself does, and lets their followers be imported after them."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in FOLLOWERS else None
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                import_followers(name)

            loader.exec_module = exec_module
        return spec


def import_followers(name: str) -> None:
    for follower in FOLLOWERS[name]:
        if follower not in sys.modules:  # else it is being imported, and itself imported `name`
            importlib.import_module(follower)


def install() -> None:
    if not any(isinstance(finder, AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterImport())
    if AUTO_CONFIG in sys.modules:
        import_followers(AUTO_CONFIG)
