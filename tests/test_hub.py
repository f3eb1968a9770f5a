"""A hub that does not answer is asked once, briefly: its own libraries would try for minutes."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedprompt_mpi import hub
from fedprompt_mpi.config import SettingsError, TaskConfig
from fedprompt_mpi.plm import hugging_face
from fedprompt_mpi.text.splits import read_splits
from fedprompt_mpi.text.tasks import resolve


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[socket.socket]]:
    """Let the hub be a place that takes connections and says nothing; yields the connections."""
    from datasets import config
    from huggingface_hub import constants

    listener, connections = socket.create_server(("127.0.0.1", 0)), []
    listener.settimeout(0.05)
    over = threading.Event()

    def listen() -> None:
        while not over.is_set():
            try:
                connections.append(listener.accept()[0])
            except TimeoutError:
                continue

    thread = threading.Thread(target=listen)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "TIMEOUT_S", 0.3)
    hub.why_not_had.cache_clear()
    yield connections
    over.set()
    thread.join()
    listener.close()
    for connection in connections:
        connection.close()
    hub.why_not_had.cache_clear()


def test_a_model_and_a_data_set(asked: list[socket.socket]) -> None:
    began = time.monotonic()
    with pytest.raises(SettingsError, match=r"'nobody/nothing': no such folder, and it cannot be had .*timed out"):
        hugging_face.download("nobody/nothing")
    with pytest.raises(SettingsError, match="whose config cannot be read"):
        hugging_face.read_config("nobody/nothing")
    assert len(asked) == 1
    config = TaskConfig(name="sst2", data="nobody/texts")
    with pytest.raises(SettingsError, match=r"it cannot be had as a hub data set .*timed out"):
        read_splits(resolve(config), config)
    assert len(asked) == 2
    assert time.monotonic() - began < 20
