"""Asking an OpenAI-compatible endpoint carefully: the one client of judges and of models that are served elsewhere."""

from tasks.http_api.client import ApiClient
from tasks.http_api.settings import check_api, key_of

__all__ = ["ApiClient", "check_api", "key_of"]
