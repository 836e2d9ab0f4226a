"""conf/cc-proxy.toml holds every setting with its default."""

import re
from pathlib import Path

from cc_proxy import settings
from tests.test_settings import DEFAULTS

CONF = Path(__file__).parent.parent / "conf" / "cc-proxy.toml"


def test_shipped_settings_are_the_defaults() -> None:
    text = CONF.read_text()
    uncommented = re.sub(r"^#([a-z_]+ = )", r"\1", text, flags=re.MULTILINE)
    assert settings.parse(text, "conf") == settings.Settings()
    assert settings.parse(uncommented, "conf") == settings.Settings()


def test_shipped_settings_are_all_there_are() -> None:
    keys, table = set(), ""
    for line in CONF.read_text().splitlines():
        if heading := re.fullmatch(r"\[(.+)\]", line):
            table = f"{heading[1]}."
        elif setting := re.match(r"#([a-z_]+) = ", line):
            keys.add(table + setting[1])
    assert keys == set(DEFAULTS)
