"""What comes late comes when it is used, also where torch's own shapes are left out of the process."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.jobs import launch, run_program

LEFT_OUT = """
import sys
from fedprompt_mpi.plm.late_imports import late_imports, on_meta, own_the_process
if {own}: own_the_process()
with late_imports():
    import torch
there = "torch._meta_registrations" in sys.modules
print("there" if there else "left out")
assert on_meta(lambda: torch.nn.Linear(3, 4)).weight.is_meta
assert ("torch._meta_registrations" in sys.modules) == there
print(tuple(on_meta(lambda: torch.linalg.eigh(torch.empty(3, 3)))[0].shape))
print(tuple(on_meta(lambda: torch._weight_int8pack_mm(
    torch.empty(2, 4, dtype=torch.bfloat16), torch.empty(5, 4, dtype=torch.int8), torch.empty(5, dtype=torch.bfloat16)
)).shape))
print("torch._meta_registrations" in sys.modules)
try:
    on_meta(lambda: (_ for _ in ()).throw(NotImplementedError("no such thing")))
except NotImplementedError as error:
    print(error)
"""


def test_shapes_come_when_an_operation_needs_them() -> None:
    """The last operation has no shape in C++: the first try fails, and is repeated with the module."""
    finished = launch(1, "-c", LEFT_OUT.format(own=True))
    assert finished.out.splitlines() == ["left out", "(3,)", "(2, 5)", "True", "no such thing"], finished


def test_a_library_call_leaves_torch_as_it_is() -> None:
    """Others may build models in the same process, and know nothing of `on_meta`."""
    finished = launch(1, "-c", LEFT_OUT.format(own=False))
    assert finished.out.splitlines()[0] == "there", finished


IN_ANOTHER_ORDER = """
from fedprompt_mpi.plm.late_imports import late_imports, own_the_process
own_the_process()
with late_imports():
    import torch
import torch._decomp.decompositions
import sys
assert torch._decomp is sys.modules["torch._decomp"]
print(callable(torch._decomp.decompositions.pw_cast_for_opmath), "torch._meta_registrations" in sys.modules)
"""


def test_what_torch_imports_after_its_shapes_brings_them() -> None:
    """In the other order there is a circle of imports."""
    finished = launch(1, "-c", IN_ANOTHER_ORDER)
    assert finished.out.split() == ["True", "True"], finished


@pytest.mark.parametrize("kind", ["llama", "t5", "roberta"])
def test_a_command_line_process_of_its_own_has_all_that_a_model_needs(
    kind: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """What one model's modules import others' do not, and no other process has imported it before."""
    flags = (f"--model.name={tiny(kind)}", "--federation.rounds=1", "--model.checkpoint_activations=true")
    finished = run_program(1, tmp_path / "run", *flags, environment={"FEDPROMPT_START": "plain"})
    assert finished.status == 0, finished
