"""What an optional package is needed for says so, before anything is trained, where that package is missing."""

import importlib.util
from typing import Any

import pytest

from fedprompt_mpi import RunConfig, run
from fedprompt_mpi.config import FederationConfig, PrivacyConfig, SettingsError


@pytest.mark.parametrize(
    ("package", "sections", "name"),
    [
        ("sklearn", {"federation": FederationConfig(aggregator="flame")}, "scikit-learn"),
        (
            "cryptography",
            {"federation": FederationConfig(update_bound=1.0), "privacy": PrivacyConfig(secure_aggregation=True)},
            "cryptography",
        ),
        ("dp_accounting", {"privacy": PrivacyConfig(mechanism="dp_fedavg")}, "dp-accounting"),
    ],
)
def test_a_missing_extra_is_named(
    package: str, sections: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked, *a: None if asked == package else find(asked, *a))
    with pytest.raises(SettingsError, match=f"pip install {name}$"):
        run(RunConfig(**sections))
