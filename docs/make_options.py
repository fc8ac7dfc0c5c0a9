"""Write docs/options.md from the code; a test compares the two."""

from dataclasses import MISSING, fields
from pathlib import Path

from volseg.options import COMMANDS
from volseg.options.declare import Options, settings_of

HEAD = """# Options of the commands

Generated from the code by `make docs`. The arguments of the Python functions have the same meaning:
`--max-ram 4G` is `max_ram="4G"`. Where the name differs, it stands in parentheses. Every command
also has `--json`, which prints one JSON object instead of text. Not listed here: `volseg check PATH
[--recipe RECIPE] [--spacing I,J,K] [--out FOLDER]` ([quality.md](quality.md)), and `volseg columns`
and `volseg selftest` without options.
"""


def options_page() -> str:
    """Return the page: a section per command, a row per argument and option."""
    sections = [_section(name, settings) for name, settings in COMMANDS.items()]
    return "\n".join([HEAD, *sections])


def _section(command: str, settings: type[Options]) -> str:
    defaults = {field.name: field.default for field in fields(settings)}  # type: ignore[arg-type]
    lines = [
        f"## volseg {command.replace('_', '-')}",
        "",
        (settings.__doc__ or "").partition("\n")[0],
    ]
    lines += ["", "| option | default | meaning |", "|---|---|---|"]
    for name, setting in settings_of(settings):
        flag = setting.flag_of(name)
        spelling = name.upper() if setting.is_argument else (setting.flag or flag)
        cell = ", ".join(f"`{text}`" for text in (spelling, setting.short) if text)
        if not setting.is_argument and flag != "--" + name.replace("_", "-"):
            cell += f" (`{name}`)"
        default = defaults[name]
        shown = (
            "required" if default is MISSING else "" if default in (None, ()) else f"`{default}`"
        )
        lines.append(f"| {cell} | {shown} | {setting.help} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    Path(__file__).with_name("options.md").write_text(options_page(), encoding="utf-8")
