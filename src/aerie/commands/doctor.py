"""`aerie doctor`."""

import json
from dataclasses import dataclass

from aerie.commands.shared import JsonOption, stdout
from aerie.doctor import diagnose
from aerie.report import key_value_table


@dataclass(frozen=True)
class DoctorOptions:
    as_json: JsonOption = False


def doctor(options: DoctorOptions) -> None:
    """Versions, devices, and which backend `auto` means here."""
    diagnosis = diagnose()
    if options.as_json:
        print(json.dumps(diagnosis))
        return
    stdout.print(key_value_table(diagnosis))
