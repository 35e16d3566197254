"""Line numbers of the keys in a TOML file."""

from __future__ import annotations

from lfmc.check.toml_lines import find_key_lines, line_of

TEXT = """\
# a comment = 1
top = 1

[table]  # with a comment
key = 2
"quoted-key" = 3

[[many]]
a = 1
[[many]]
a.b = [
  1,
]
[table.inner]
key = 4
"""


def test_tables_keys_and_repeated_tables() -> None:
    assert find_key_lines(TEXT) == {
        ("top",): 2,
        ("table",): 4,
        ("table", "key"): 5,
        ("table", "quoted-key"): 6,
        ("many", 0): 8,
        ("many", 0, "a"): 9,
        ("many", 1): 10,
        ("many", 1, "a", "b"): 11,
        ("table", "inner"): 14,
        ("table", "inner", "key"): 15,
    }


def test_a_path_without_a_line_has_the_line_of_its_parent() -> None:
    lines = find_key_lines(TEXT)
    assert line_of(lines, ("many", 1, "a", "b", 0)) == 11
    assert line_of(lines, ("many", 0, "missing")) == 8
    assert line_of(lines, ("nothing",)) == 1
