"""Bring the database of Prefect's server up to date: the tables, then the block types that its UI offers.

Once, before any replica starts. Replicas that find no block types register them at the same time, and all but one end
with an IntegrityError (seen with Prefect 3.8.8); replicas that find them leave them alone.
"""

import asyncio

from prefect.server.database import provide_database_interface
from prefect.server.models.block_registration import run_block_auto_registration


async def prepare() -> None:
    """Migrate, then register."""
    database = provide_database_interface()
    await database.create_db()
    async with await database.session() as session:
        await run_block_auto_registration(session=session)


asyncio.run(prepare())
