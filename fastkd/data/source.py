"""Former name of `fastkd.data.writer_api`, for writers that import it; removed in the next release."""

from fastkd import console
from fastkd.data.writer_api import *  # noqa: F403

console.warn("fastkd.data.source is now fastkd.data.writer_api: change the imports of your writer")
