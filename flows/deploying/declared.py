"""What is declared: deployments, their schedules and triggers, work pools and automations, read and checked."""

import json
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Literal, Self, get_args

from prefect.client.schemas.objects import ConcurrencyOptions
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.events.schemas.automations import AutomationCore
from prefect.events.schemas.deployment_triggers import DeploymentTriggerTypes
from pydantic import BaseModel, ConfigDict, Field, model_validator

from merging_core.errors import RecipeError
from tasks.names import check_names, nearest, repeated
from tasks.recipes import read_yaml, validated

Profile = Literal["local", "docker", "kubernetes"]
PROFILES: Final[tuple[str, ...]] = get_args(Profile)
SHIPPED: Final = Path(__file__).parents[2] / "deployments"
TAG: Final = "tripoise"
"""Marks every deployment and automation that `tripoise deploy` made."""
POOLS: Final = {"tripoise-cpu": "cpu", "tripoise-gpu": "gpu"}
"""Work pool to the second part of its template's name."""
_TYPES: Final = {"local": "process", "docker": "docker", "kubernetes": "kubernetes"}
_STRICT: Final = ConfigDict(extra="forbid")


class _Schedule(BaseModel):
    model_config = _STRICT
    cron: str = ""
    interval: float = Field(default=0, ge=0)
    """Seconds."""
    timezone: str = "UTC"
    active: bool = True
    slug: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.schedule()
        return self

    def schedule(self) -> CronSchedule | IntervalSchedule:
        """As Prefect has it."""
        if bool(self.cron) == bool(self.interval):
            raise RecipeError("schedule: expected either cron or interval (seconds).")
        if self.cron:
            return CronSchedule(cron=self.cron, timezone=self.timezone)
        return IntervalSchedule(interval=timedelta(seconds=self.interval), timezone=self.timezone)


class _Limit(ConcurrencyOptions):
    model_config = _STRICT
    limit: int = Field(ge=1)


class _WorkPool(BaseModel):
    model_config = _STRICT
    name: str
    work_queue_name: str | None = None
    job_variables: dict[str, Any] = Field(default_factory=dict)


class Deployment(BaseModel):
    """One deployment of prefect.yaml."""

    model_config = _STRICT
    name: str = Field(min_length=1)
    entrypoint: str = Field(pattern=r"^[\w.]+$")
    """Import path of the flow: the package is installed wherever it runs."""
    description: str = Field(min_length=1)
    tags: list[str] = Field(default_factory=list)
    parameters: dict[str, Any] = Field(default_factory=dict)
    work_pool: _WorkPool
    concurrency_limit: _Limit | None = None
    schedules: list[_Schedule] = Field(default_factory=list)
    triggers: list[DeploymentTriggerTypes] = Field(default_factory=list)


class _PrefectFile(BaseModel):
    model_config = _STRICT
    name: str = ""
    prefect_version: str = Field(default="", alias="prefect-version")
    build: list[Any] = Field(default_factory=list, max_length=0)
    push: list[Any] = Field(default_factory=list, max_length=0)
    pull: list[Any] = Field(max_length=0)
    definitions: dict[str, Any] = Field(default_factory=dict)
    deployments: list[Deployment]


class _AutomationsFile(BaseModel):
    model_config = _STRICT
    automations: list[AutomationCore] = Field(default_factory=list)


class _Alert(BaseModel):
    model_config = _STRICT
    name: str = Field(min_length=1)
    expect: set[str] = Field(min_length=1)
    """Names of events."""
    subject: str
    body: str


class Alerts(BaseModel):
    """What ``alerts.yaml`` says: who is told of what."""

    model_config = _STRICT
    block: str
    """Name of the notification blocks by which they are told."""
    alerts: list[_Alert] = Field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Pool:
    """A work pool and the template of its jobs."""

    name: str
    type: str
    template: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Declared:
    """All that a server is to have."""

    deployments: list[Deployment]
    automations: list[AutomationCore]
    pools: list[Pool]
    alerts: Alerts | None = None


def read_declared(folder: Path, profile: str) -> Declared:
    """Read a folder like ``deployments/``: prefect.yaml, automations.yaml, pools/ and perhaps alerts.yaml.

    Raises:
        RecipeError: naming file and entry, what was expected and, for a misspelt name, the nearest right one.
    """
    if profile not in PROFILES:
        raise RecipeError(
            f"profile {profile!r} does not exist.{nearest(profile, PROFILES)} All: {', '.join(PROFILES)}."
        )
    file: _PrefectFile = _read(_PrefectFile, folder / "prefect.yaml")
    if twice := repeated(one.name for one in file.deployments):
        raise RecipeError(f"prefect.yaml: deployment {twice[0]} stands twice. Names must differ.")
    for one in file.deployments:
        check_names(f"prefect.yaml: deployment {one.name}: work pool", {one.work_pool.name: None}, POOLS)
    pools = [Pool(name, _TYPES[profile], _template(folder, _TYPES[profile], kind)) for name, kind in POOLS.items()]
    automations: _AutomationsFile = _read(_AutomationsFile, folder / "automations.yaml")
    alerts = _read(Alerts, folder / "alerts.yaml") if (folder / "alerts.yaml").exists() else None
    return Declared(file.deployments, automations.automations, pools, alerts)


def _read(shape: type[BaseModel], path: Path) -> Any:
    return validated(shape, read_yaml(path), path.name)


def _template(folder: Path, kind: str, suffix: str) -> dict[str, Any]:
    path = folder / "pools" / f"{kind}-{suffix}.json"
    try:
        template: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read ({error}). Take it from the shipped {SHIPPED / 'pools'}.") from error
    return template
