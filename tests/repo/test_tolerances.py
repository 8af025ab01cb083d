"""The table of tolerances leaves room for other processors, and each of its rows is used."""

import re

import pytest
from closeness import Close
from repo import tolerances
from repo.sources import ROOT, python_files


def table():
    """(row, bound, worst errors) of every line of the table."""
    text = tolerances.TABLE.read_text(encoding="utf-8")
    for match in tolerances.ROW.finditer(text):
        bound, *worst = map(float, re.search(r"Row\(([^)]*)\)", match[0])[1].split(","))
        yield match[1], bound, worst


def test_a_bound_is_three_times_the_worst_error_in_every_setting(tolerance) -> None:
    rows = list(table())
    assert {row for row, _, _ in rows} == set(tolerance)
    for row, bound, worst in rows:
        assert len(worst) == len(tolerances.SETTINGS)
        assert tolerances.ROOM * max(worst) <= bound, row
    assert all(max(worst) > 0 for row, _, worst in rows if row != "bf16_sums"), "not measured"


def test_every_row_of_the_table_is_in_use(tolerance) -> None:
    texts = [path.read_text(encoding="utf-8") for path in python_files(ROOT / "tests")]
    for row in tolerance:
        use = re.compile(rf'close(\.norm|\.error)?\(\s*"{row}"|\.\w+\[?"{row}"|, "{row}"')
        assert any(map(use.search, texts)), row


def test_measured_errors_are_written_beside_their_bounds() -> None:
    text = '    # Why.\n    "module": Row(1e-5, 0, 0, 0, 0),\n    "other": Row(1, 2, 3, 4, 5),\n'
    found = tolerances.written(text, {"module": [1e-7, 2e-7, 3e-7, 4e-7]})
    assert '"module": Row(1e-5, 1.0e-07, 2.0e-07, 3.0e-07, 4.0e-07),' in found
    assert '"other": Row(1, 2, 3, 4, 5),' in found


def test_a_sum_that_cancels_is_judged_by_the_size_of_its_terms() -> None:
    close = Close({"row": 1e-5})
    close("row", -0.054064043, -0.054064636, of=1.0)
    assert close.worst["row"][0] == pytest.approx(5.93e-7, rel=1e-3)
    with pytest.raises(AssertionError, match=r"the error is 1.1e-05, and row allows 1e-05"):
        close("row", -0.054064043, -0.054064636)


@pytest.mark.parametrize("got", [[1.0, float("nan")], [1.0, 2.1], [1.0, float("inf")]])
def test_what_is_no_number_is_not_close(got) -> None:
    close = Close({"row": 1e-5})
    with pytest.raises(AssertionError):
        close("row", got, [1.0, 2.0])
    assert "row" in close.worst
