import pytest

from volseg.words import duration, format_thousands


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "a second"),
        (45, "45 s"),
        (2700, "45 min"),
        (21600, "6 h"),
        (22000, "6.1 h"),
        (200_000, "2.3 days"),
    ],
)
def test_a_duration_has_two_digits_in_a_suitable_unit(seconds, text):
    assert duration(seconds) == text


def test_thousands_have_a_space_between_them():
    assert [format_thousands(n) for n in (0, 999, 1000, 1_234_567)] == [
        "0",
        "999",
        "1 000",
        "1 234 567",
    ]
