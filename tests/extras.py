"""Checks that an optional extra of hf_mos is installed."""

from importlib import metadata

from packaging.requirements import Requirement


def missing_requirements(extra: str, distribution: str = "hf_mos") -> list[str]:
    """Requirements of an extra, and of the extras that it names, that this environment does not meet."""
    missing = []
    for requirement in map(Requirement, metadata.requires(distribution) or []):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}) or not marker.evaluate({"extra": extra}):
            continue  # belongs to the package itself, to another extra, or to another platform
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(f"{requirement.name}{requirement.specifier}")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            missing.append(f"{requirement.name}{requirement.specifier} (installed: {version})")
        for nested in sorted(requirement.extras):
            missing += missing_requirements(nested, requirement.name)
    return missing
