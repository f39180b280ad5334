"""`serve run server.deploy.ray_serve:app`: what `aft serve --ray` serves; the options are read from AFT_* variables."""

from __future__ import annotations

from server import cli
from server.deploy.replicas import application

app = cli.app(["serve", "--ray"], standalone_mode=False, obj=application)
