"""Networks: the presets, and what a file may not say."""

from pathlib import Path

import pytest

from fedprompt_mpi import SettingsError
from fedprompt_mpi.forecast.network import presets, read_network

GOOD = 'name = "n"\nlatency_us = 1\nup_mbit = 100\ndown_mbit = 100\nsource = "s"\n'


@pytest.mark.parametrize("name", presets())
def test_presets_say_where_their_figures_come_from(name: str) -> None:
    network = read_network(name)
    assert len(network.source) > 20 and network.busiest_s_per_byte > 0


def test_the_presets_of_the_guide_are_there() -> None:
    assert presets() == ["100gbe", "100mbit", "10gbe", "1gbe", "home", "infiniband-hdr", "mobile"]


def test_the_server_s_link_may_be_another() -> None:
    home = read_network("home")
    up, server = (home.seconds_per_byte(up=True, server=at) for at in (False, True))
    assert up == pytest.approx(8e-6 / 20 / home.efficiency) and server == pytest.approx(8e-6 / 10_000 / home.efficiency)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD.replace("up_mbit = 100\n", ""), "up_mbit"),
        (GOOD.replace("latency_us = 1", "latency_us = -1"), "latency_us is -1"),
        (GOOD.replace("up_mbit = 100", "up_mbit = 0"), "up_mbit is 0"),
        (GOOD.replace("up_mbit = 100", "up_mbit = inf"), "up_mbit is inf"),
        (GOOD.replace("up_mbit = 100", "up_mbit = nan"), "up_mbit is nan"),
        (GOOD.replace("up_mbit = 100", 'up_mbit = "fast"'), "up_mbit"),
        (GOOD.replace("up_mbit = 100", "up_mbit = 1e-300"), "up_mbit is 1e-300"),
        (GOOD + "efficiency = 1.5\n", "efficiency is 1.5"),
        (GOOD + "speed = 1\n", "speed is no figure of a network"),
        (GOOD + "nodes = 0\n", "nodes is 0"),
        (GOOD + "[server]\nup_mbit = 1\n", "down_mbit"),
        (GOOD + "[contention]\ntotal_mbit = -5\n", "contention.total_mbit is -5"),
        (GOOD + "[contention]\ncores = 0\n", "contention.cores is 0"),
        (GOOD + "[contention]\nburst = 1\n", "contention.burst is no figure"),
        ("server = 1\n" + GOOD, "server"),
        ("nonsense", "cannot be read as a network"),
    ],
)
def test_a_file_that_is_no_network(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "network.toml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=words):
        read_network(str(file))


def test_a_network_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"neither a file nor one of 100gbe, 100mbit"):
        read_network(str(tmp_path / "gone.toml"))
    with pytest.raises(SettingsError, match="--measured-on is 'home', where MPI would not run"):
        read_network("home", "--measured-on", runs_mpi=True)
    with pytest.raises(SettingsError, match="--measured-on"):
        read_network(str(tmp_path), "--measured-on")
