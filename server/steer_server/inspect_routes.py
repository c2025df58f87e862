"""Inspection over HTTP: one route for each method in `steer.inspection`."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from steer_server.content_type import require_json

router = APIRouter(prefix="/v1/inspect", tags=["inspection"], dependencies=[Depends(require_json)])
