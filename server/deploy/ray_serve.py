"""`serve run server.deploy.ray_serve:app`: what `aft serve --ray` serves; the options are read from AFT_* variables."""

from __future__ import annotations

from server.config import server_config
from server.deploy.replicas import application
from server.options import from_environment

app = application(from_environment(server_config))
