"""conf/cc-proxy.toml holds every setting with its default."""

import re
from pathlib import Path

from cc_proxy import settings

CONF = Path(__file__).parent.parent / "conf" / "cc-proxy.toml"


def test_shipped_settings_are_the_defaults() -> None:
    text = CONF.read_text()
    uncommented = re.sub(r"^#([a-z_]+ = )", r"\1", text, flags=re.MULTILINE)
    assert settings.parse(text, "conf") == settings.Settings()
    assert settings.parse(uncommented, "conf") == settings.Settings()


def test_shipped_settings_are_all_there_are() -> None:
    keys = set(re.findall(r"^#([a-z_]+) = ", CONF.read_text(), flags=re.MULTILINE))
    tables = settings.Settings.__struct_fields__[1:]
    every = {field for table in tables for field in getattr(settings.Settings(), table).__struct_fields__}
    assert keys == every | {"socket_path"}
