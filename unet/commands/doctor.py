"""Look at a cluster, or at this machine, before a run: a line for each check, with what to do about it.

examples:
    python jobs/doctor.py --storage-path s3://BUCKET/runs --tracking-uri http://HOST:5000
    python jobs/doctor.py --data FOLDER --json
    ray job submit --working-dir . -- python jobs/doctor.py …

Looks from every node at versions, processors, memory, disks, the storage path and its locks, MLflow, data, ports and
clocks: a few seconds, half a minute if a node is silent. It works on a full cluster, too, and leaves nothing behind.
Exit code 0: all is well, or there are warnings only; 1: something fails; 2: wrong flags.
"""

from unet.commands import cli
from unet.config.doctor import DoctorSettings


def run(settings: DoctorSettings) -> int:
    from unet.doctor import report
    from unet.doctor.examination import examine
    from unet.terminal import Display

    display = Display(quiet=settings.doctor.as_json)
    try:
        found = examine(settings, display.waiting)
    finally:
        display.close()
    said = report.findings(found)
    if settings.doctor.as_json:
        print(report.as_json(found, said))
    else:
        report.show(display, found, said)
    return cli.FAILED if report.fails(said) else cli.DONE


def main() -> None:
    cli.main(DoctorSettings, run, __doc__, any_version=True)
