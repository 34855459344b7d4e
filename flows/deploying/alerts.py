"""Alerts: automations that notify. Whom, a server tells by its notification blocks of one agreed name."""

from prefect.client.orchestration import SyncPrefectClient
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

from flows.deploying.declared import Alerts

_MODELS = {"prefect.resource.id": "tripoise.model.*"}


def alert_automations(declared: Alerts, client: SyncPrefectClient) -> tuple[list[AutomationCore], str]:
    """The automations of ``alerts.yaml`` for every notification block of the name that it gives.

    Args:
        declared: what it says.
        client: of the server that has the blocks.

    Returns:
        The automations, none without such a block; and a line that says by what they notify.
    """
    blocks = [one for one in client.read_block_documents(include_secrets=False) if one.name == declared.block]
    if not blocks:
        return [], f"no alerts: the server has no notification block {declared.block}"
    found = [
        AutomationCore(
            name=one.name,
            description=f"Notifies by the block {declared.block}.",
            trigger=EventTrigger(posture=Posture.Reactive, expect=one.expect, match=_MODELS, threshold=1),  # type: ignore[arg-type]
            actions=[
                SendNotification(block_document_id=block.id, subject=one.subject, body=one.body) for block in blocks
            ],
        )
        for one in declared.alerts
    ]
    kinds = ", ".join(sorted(block.block_type_name or "block" for block in blocks))
    return found, f"{len(found)} alerts by {declared.block} ({kinds})"
