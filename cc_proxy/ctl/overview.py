"""Formats a status for people. No I/O."""

from collections.abc import Iterator, Sequence

from cc_proxy.api import LastError, Status, Streams, UserStatus, VmStatus, WaitingStream
from cc_proxy.api.status import count
from cc_proxy.log.printable import printable

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_PERIODS = ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"))
_HEADINGS = ("VM", "USER", "STATE", "AGE", "CLIENTS", "SESSIONS", "TO CLIENTS", "TO VM", "STRAYS", "PAUSES")
_USER_HEADINGS = ("USER", "CONNECTIONS", "VMS", "SESSIONS", "COMMANDS", "SPOOLED")
_UNKNOWN = "no answer"


def overview(status: Status) -> str:
    """Return a status as lines of text: the daemon, a table of the VMs, what waits, and what went wrong."""
    lines = list(_daemon(status))
    if status.vms:
        lines += ["", *_table([_HEADINGS, *map(_row, status.vms)])]
    if status.vm_count > len(status.vms):
        lines.append(f"… and {status.vm_count - len(status.vms)} more")
    if len(status.users) > 1:
        lines += ["", *_table([_USER_HEADINGS, *map(_user, status.users)])]
    waiting = [f"{printable(vm.id)}: {what}" for vm in status.vms for what in waits(vm)]
    lines += _section("What waits:", waiting)
    errors = [(vm.id, vm.last_error) for vm in status.vms if vm.last_error]
    lines += _section("Last errors:", _errors(errors))
    lines += _section("VMs that failed and are gone:", _errors([(vm.id, vm.error) for vm in status.ended]))
    return "".join(f"{line}\n" for line in lines)


def waits(vm: VmStatus) -> Iterator[str]:
    """Yield one line for each thing that waits in a VM, and for whom it waits."""
    if not vm.answers:
        yield "its I/O pump does not answer: it is busy or stuck"
    if vm.streams:
        yield from map(_stream, vm.streams.waiting)
        left_out = vm.streams.waiting_sessions - len(vm.streams.waiting)
        if left_out:
            yield f"{left_out} more streams wait for their clients"
        yield from _stdin(vm.streams)
    for command in vm.commands:
        yield f"the command {printable(command.name)} has waited for the agent for {age(command.age)}"
    if vm.waiting_commands > len(vm.commands):
        yield f"{vm.waiting_commands - len(vm.commands)} more commands wait behind them"
    if vm.unanswered > vm.waiting_commands:
        yield f"the agent has left {count(vm.unanswered - vm.waiting_commands, 'command')} unanswered"


def size(number: int) -> str:
    """Return a number of bytes in a suitable unit."""
    unit = min(max(number.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    return f"{number / 1024**unit:.4g} {_UNITS[unit]}"


def age(seconds: float) -> str:
    """Return a time in seconds in its two largest units."""
    left = int(seconds)
    parts: list[str] = []
    for length, unit in _PERIODS:
        number, left = divmod(left, length)
        if number or parts:
            parts.append(f"{number} {unit}" if number else "")
    return " ".join(filter(None, parts[:2])) or "0 s"


def _daemon(status: Status) -> Iterator[str]:
    yield f"cc-proxy {printable(status.version)}, pid {status.pid}, up for {age(status.uptime)}"
    if status.replaced.last:
        yield _replaced(status)
    settings = printable(status.settings_file) or "the defaults, there is no file"
    yield f"settings: {settings}; log level: {printable(status.log_level)}"
    sessions = sum(vm.streams.sessions for vm in status.vms if vm.streams)
    yield (
        f"{count(status.vm_count, 'VM')}, {count(sessions, 'session')}, "
        f"{count(status.connections, 'connection')}; {size(status.spooled)} spooled"
    )


def _replaced(status: Status) -> str:
    replaced = status.replaced
    times = [count(replaced.restarts, "restart")] if replaced.restarts else []
    times += (
        [f"{replaced.crashes} {'crash' if replaced.crashes == 1 else 'crashes'}"] if replaced.crashes else []
    )
    return (
        f"VMs have been kept for {age(status.known_for)}, through {' and '.join(times)}; "
        f"this process began after a {printable(replaced.last)}"
        + (f"; {count(status.gaps, 'gap')} of {size(status.lost)} at most" if status.gaps else "")
    )


def _row(vm: VmStatus) -> tuple[str, ...]:
    first = printable(vm.id), str(vm.uid), printable(vm.state), age(vm.age), str(vm.clients)
    if vm.streams is None:
        return *first, "-" if vm.answers else _UNKNOWN, "", "", "", ""
    traffic = vm.streams.traffic
    return (
        *first,
        str(vm.streams.sessions),
        f"{size(traffic.bytes_to_clients)} in {traffic.frames_to_clients}",
        f"{size(traffic.bytes_to_vm)} in {traffic.frames_to_vm}",
        str(traffic.stray_frames),
        str(traffic.pauses),
    )


def _user(user: UserStatus) -> tuple[str, ...]:
    numbers = (user.uid, user.connections, user.vms, user.sessions, user.commands)
    return *map(str, numbers), size(user.spooled)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _stream(stream: WaitingStream) -> str:
    waiting = [f"{size(stream.spooled)} spooled"] if stream.spooled else []
    waiting += [f"{size(stream.pending)} in memory"] if stream.pending else []
    client = f"its client (pid {stream.pid}, user {stream.uid})"
    text = f"{client} has taken nothing for {age(stream.idle)}; {', '.join(waiting)}"
    if stream.reason:
        text += f"; {printable(stream.reason)}"
    if stream.holds_vm:
        return f"the VM waits for stream {stream.stream}: {text}"
    return f"stream {stream.stream} (the VM does not wait for it): {text}"


def _stdin(streams: Streams) -> Iterator[str]:
    if streams.stdin_held:
        held = size(streams.stdin_held)
        yield f"the VM has taken no stdin for {age(streams.stdin_stalled)}: {held} wait for it"
    if streams.stdin_unacknowledged:
        yield f"stdin of {count(streams.stdin_unacknowledged, 'session')} waits for the agent to acknowledge"


def _errors(errors: Sequence[tuple[str, LastError]]) -> list[str]:
    return [f"{printable(name)}: {printable(error.text)} ({age(error.age)} ago)" for name, error in errors]


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", title, *(f"  {line}" for line in lines)] if lines else []
