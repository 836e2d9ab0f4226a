"""What both packages install, and how it is asked about once it is there."""

from __future__ import annotations

from tests.packaging.box import Box

#: Path, and its owner and mode.
FILES = {
    "/etc/cc-proxy": "root:root 755",
    "/etc/cc-proxy/cc-proxy.toml": "root:root 644",
    "/etc/cc-proxy/guest.toml": "root:root 644",
    "/usr/bin/cc-proxyctl": "root:root 755",
    "/usr/sbin/cc-proxy": "root:root 755",
    "/usr/lib/cc-proxy/cc_proxy/__init__.py": "root:root 644",
    "/usr/lib/cc-proxy/msgspec/__init__.py": "root:root 644",
    "/usr/lib/cc-proxy/selectors2.py": "root:root 644",
    "/usr/lib/sysusers.d/cc-proxy.conf": "root:root 644",
    "/usr/lib/tmpfiles.d/cc-proxy.conf": "root:root 644",
    "/usr/lib/systemd/system/cc-proxy.service": "root:root 644",
    "/usr/lib/systemd/system/cc-proxy.socket": "root:root 644",
    "/usr/share/bash-completion/completions/cc-proxy": "root:root 644",
    "/usr/share/bash-completion/completions/cc-proxyctl": "root:root 644",
    "/usr/share/fish/vendor_completions.d/cc-proxy.fish": "root:root 644",
    "/usr/share/fish/vendor_completions.d/cc-proxyctl.fish": "root:root 644",
    # Whose group may connect.
    "/run/cc-oci-runtime": "root:cc-proxy 750",
}
UNITS = ("cc-proxy.socket", "cc-proxy.service")
MAN_PAGES = {"cc-proxy": "8", "cc-proxyctl": "1", "cc-proxy.toml": "5", "cc-proxy-guest.toml": "5"}


def found(box: Box, paths: dict[str, str]) -> dict[str, str]:
    """Returns who owns each path and its mode, as far as it is there."""
    shown = box.run("stat", "--printf", "%n\t%U:%G %a\n", *paths, check=False).stdout
    return dict(line.split("\t") for line in shown.splitlines() if "\t" in line)


def runs_a_process(box: Box) -> bool:
    """Whether the daemon that is installed carries a process through from start to end."""
    return (
        box.output("cc-proxyctl", "run", "--local", "--", "echo", "through the daemon")
        == "through the daemon"
    )
