"""The output folder: cached steps, what a change redoes, refusals, a full disk."""

import pytest

from tfvllm.compress.console import Console
from tfvllm.compress.steps import open_workspace
from tfvllm.errors import InputError, TfvllmError

QUIET = Console(quiet=True)


class Steps:
    """Runs a chain of two steps and remembers what was built."""

    def __init__(self, out):
        self.out = out
        self.built = []

    def run(self, first=1, second=1, resume=False, overwrite=False):
        self.built = []
        with open_workspace(self.out, QUIET, resume=resume, overwrite=overwrite) as workspace:
            a = workspace.do("first", {"p": first}, [], self._build("first"))
            return workspace.do("second", {"p": second}, [a], self._build("second"))

    def _build(self, name):
        def build(directory, work):
            self.built.append(name)
            (directory / "file").write_text(name)
            return {"made": name}

        return build


def test_steps_are_kept_and_a_change_redoes_itself_and_what_follows(tmp_path):
    steps = Steps(tmp_path / "out")
    done = steps.run()
    assert steps.built == ["first", "second"] and not done.cached
    done = steps.run(resume=True)
    assert steps.built == [] and done.cached and done.result["made"] == "second"
    assert (done.directory / "file").read_text() == "second"
    steps.run(second=2, resume=True)
    assert steps.built == ["second"]
    steps.run(first=2, second=2, resume=True)
    assert steps.built == ["first", "second"]
    steps.run(resume=True)  # back to the first recipe: its results are still there
    assert steps.built == []


def test_an_existing_folder_is_refused_unless_told(tmp_path):
    steps = Steps(tmp_path / "out")
    steps.run()
    with pytest.raises(InputError, match="pass --resume to go on with it, --overwrite to start afresh"):
        steps.run()
    steps.run(overwrite=True)
    assert steps.built == ["first", "second"]


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_that_no_run_made_is_never_touched(tmp_path, flags):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"choose another --out"):
        Steps(tmp_path).run(**flags)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="expected a folder for the run, found a file"):
        Steps(tmp_path / "out").run()


def test_two_runs_do_not_share_a_folder(tmp_path):
    with (
        open_workspace(tmp_path / "out", QUIET),
        pytest.raises(InputError, match="in use by another run"),
        open_workspace(tmp_path / "out", QUIET, resume=True),
    ):
        pass


def test_a_failed_step_leaves_no_result_but_keeps_its_work(tmp_path):
    def fails(directory, work):
        (directory / "half").write_text("half")
        (work / "epoch").write_text("1")
        raise OSError(28, "No space left on device")

    def goes_on(directory, work):
        return {"epoch": (work / "epoch").read_text()}

    with open_workspace(tmp_path / "out", QUIET) as workspace:
        with pytest.raises(TfvllmError, match=r"No space left on device\. Nothing was changed"):
            workspace.do("step", {}, [], fails)
        assert [entry.name.split(".")[-1] for entry in (tmp_path / "out" / "steps").iterdir()] == ["work"]
        done = workspace.do("step", {}, [], goes_on)
    assert done.result["epoch"] == "1"
    assert [entry.name for entry in (tmp_path / "out" / "steps").iterdir()] == [f"step-{done.key}"]


def test_ctrl_c_says_how_to_go_on(tmp_path):
    def interrupted(directory, work):
        raise KeyboardInterrupt

    with (
        open_workspace(tmp_path / "out", QUIET) as workspace,
        pytest.raises(TfvllmError, match=r"interrupted in step teacher; .* go on with --resume"),
    ):
        workspace.do("teacher", {}, [], interrupted)
