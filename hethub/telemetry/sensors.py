"""Power, temperature and energy of real devices: NVIDIA's through NVML, other vendors' from what their command prints.

A thread reads every few seconds, so that a scrape never waits for a command. A vendor without an adapter here, or whose
library or command is missing, has no readings; nothing is made up.
"""

from __future__ import annotations

import csv
import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Reading",
    "Sensors",
    "parse_hl_smi",
    "parse_npu_smi",
    "parse_rocm_smi",
    "parse_xpu_smi",
]

_EVERY_SECONDS = 5.0
_COMMAND_SECONDS = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a sensor says of one device; None is unknown. `joules` count from any beginning."""

    source: str
    watts: float | None = None
    celsius: float | None = None
    joules: float | None = None
    uuid: str = ""


@dataclass(frozen=True, slots=True)
class Adapter:
    """How a vendor's devices are read, by their index on the machine. `read` raises OSError, ValueError or a vendor's
    own error where nothing can be read."""

    source: str
    read: Callable[[], Mapping[int, Reading]]


# -- NVIDIA -------------------------------------------------------------------------------------------------------


def _read_nvml() -> dict[int, Reading]:
    import pynvml

    pynvml.nvmlInit()
    found = {}
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)

        def ask(
            function: Callable[..., Any], *arguments: Any, per: float = 1.0, of: Any = handle
        ) -> float | None:
            """A figure, None where this device does not have it."""
            try:
                return float(function(of, *arguments)) / per
            except pynvml.NVMLError:
                return None

        uuid = pynvml.nvmlDeviceGetUUID(handle)
        found[index] = Reading(
            source="nvml",
            watts=ask(pynvml.nvmlDeviceGetPowerUsage, per=1e3),
            celsius=ask(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
            joules=ask(pynvml.nvmlDeviceGetTotalEnergyConsumption, per=1e3),
            uuid=uuid.decode() if isinstance(uuid, bytes) else uuid,
        )
    return found


# -- commands -----------------------------------------------------------------------------------------------------


def _number(text: object) -> float | None:
    """The number at the beginning of a text such as "92 W"; None where there is none, such as in "N/A"."""
    match = re.match(r"\s*([0-9]+(?:\.[0-9]+)?)", str(text))
    return float(match[1]) if match else None


def _first(card: Mapping[str, object], *patterns: str) -> float | None:
    """The number of the first key that one of the patterns finds: names changed between releases."""
    for pattern in patterns:
        for key, value in card.items():
            if re.search(pattern, key) and (number := _number(value)) is not None:
                return number
    return None


def parse_rocm_smi(text: str, source: str = "rocm-smi") -> dict[int, Reading]:
    """`rocm-smi --showpower --showtemp --showuniqueid --json`, and hy-smi's, which is alike."""
    found = {}
    for name, card in json.loads(text).items():
        match = re.fullmatch(r"card(\d+)", name)
        if match is None:
            continue
        found[int(match[1])] = Reading(
            source=source,
            watts=_first(card, r"^Current Socket.*Power", r"^Average.*Power"),
            celsius=_first(card, r"Sensor junction", r"Sensor edge"),
            uuid=str(card.get("Unique ID", "")),
        )
    return found


def parse_npu_smi(text: str) -> dict[int, Reading]:
    """The table of `npu-smi info`: two lines a chip, the first with its card's power and temperature.

    Chips are counted in the order of the table. A card of two chips shows its power once: the chip without has none.
    """
    found: dict[int, Reading] = {}
    for line in text.splitlines():
        if re.match(r"\|\s*No running process|\|.*Process", line):
            break
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 3 and re.match(r"\d+\s+\S*[A-Za-z]", cells[0]):
            numbers = cells[2].split()
            found[len(found)] = Reading(
                source="npu-smi", watts=_number(numbers[0]), celsius=_number(numbers[1])
            )
    return found


def parse_hl_smi(text: str) -> dict[int, Reading]:
    """`hl-smi -Q index,uuid,temperature.aip,power.draw -f csv,noheader`."""
    found = {}
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) >= 4 and row[0].strip().isdigit():
            found[int(row[0])] = Reading(
                source="hl-smi", uuid=row[1].strip(), celsius=_number(row[2]), watts=_number(row[3])
            )
    return found


def parse_xpu_smi(text: str) -> dict[int, Reading]:
    """`xpu-smi dump -d -1 -m 1,3 -n 1`: a header that names the columns, then a line a device."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]
    header = next((row for row in rows if "DeviceId" in row), None)
    if header is None:
        raise ValueError("xpu-smi printed no header")
    found = {}
    for row in rows[rows.index(header) + 1 :]:
        card = dict(zip(header, row, strict=False))
        if card.get("DeviceId", "").isdigit():
            found[int(card["DeviceId"])] = Reading(
                source="xpu-smi",
                watts=_first(card, r"^GPU Power"),
                celsius=_first(card, r"^GPU Core Temperature"),
            )
    return found


def _command(source: str, words: str, parse: Callable[[str], Mapping[int, Reading]]) -> Adapter:
    def read() -> Mapping[int, Reading]:
        done = subprocess.run(
            [source, *words.split()], capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=True
        )
        return parse(done.stdout)

    return Adapter(source, read)


ADAPTERS: Mapping[str, Adapter] = {
    "nvidia": Adapter("nvml", _read_nvml),
    "amd": _command("rocm-smi", "--showpower --showtemp --showuniqueid --json", parse_rocm_smi),
    "hygon": _command(
        "hy-smi", "--showpower --showtemp --json", lambda text: parse_rocm_smi(text, source="hy-smi")
    ),
    "huawei": _command("npu-smi", "info", parse_npu_smi),
    "intel-gaudi": _command(
        "hl-smi", "-Q index,uuid,temperature.aip,power.draw -f csv,noheader", parse_hl_smi
    ),
    "intel": _command("xpu-smi", "dump -d -1 -m 1,3 -n 1", parse_xpu_smi),
}
"""By the catalog's names of vendors."""


class Sensors:
    """The last readings of this machine's devices. Vendors are read from the first time that one is asked for."""

    def __init__(
        self,
        adapters: Mapping[str, Adapter] = ADAPTERS,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._adapters = adapters
        self._now = now
        self._readings: dict[str, dict[int, Reading]] = {}
        self._read_at: dict[str, float] = {}

    def of(self, vendor: str, index: int, *, emulated: bool) -> Reading | None:
        """The last reading of a device; None where there is none."""
        if emulated or vendor not in self._adapters:
            return None
        if vendor not in self._readings:
            self._readings[vendor] = {}
            threading.Thread(target=self._keep, args=(vendor,), name=f"sensors {vendor}", daemon=True).start()
        return self._readings[vendor].get(index)

    def _keep(self, vendor: str) -> None:
        """Read a vendor's devices now and then, until they cannot be read at all."""
        waiting = threading.Event()
        while self.read(vendor):
            waiting.wait(_EVERY_SECONDS)

    def read(self, vendor: str) -> bool:
        """Read a vendor's devices once; False where its library or command is missing."""
        try:
            fresh = self._adapters[vendor].read()
        except (ImportError, FileNotFoundError):
            return False
        except Exception:  # a vendor's library has errors of its own; the next reading may do
            self._readings[vendor] = {}
            return True
        self._take(vendor, fresh)
        return True

    def _take(self, vendor: str, fresh: Mapping[int, Reading]) -> None:
        """Keep readings; where a device only tells its power, its energy is that power over the time since the last
        reading."""
        now = self._now()
        before, since = self._readings.get(vendor, {}), self._read_at.get(vendor, now)
        self._readings[vendor] = dict(_with_energy(fresh, before, now - since))
        self._read_at[vendor] = now


def _with_energy(
    fresh: Mapping[int, Reading], before: Mapping[int, Reading], seconds: float
) -> Iterator[tuple[int, Reading]]:
    for index, reading in fresh.items():
        if reading.joules is not None or reading.watts is None:
            yield index, reading
            continue
        last = before.get(index)
        spent = 0.0
        if last is not None and last.watts is not None and last.joules is not None:
            spent = last.joules + (last.watts + reading.watts) / 2 * seconds
        yield index, replace(reading, joules=spent)
