"""Grafana's boards as code: what stands on them, and the JSON that Grafana reads.

Needs the foundation SDK (`hethub[dashboards]`) only where JSON is made.
"""

from hethub.telemetry.boards.hardware import HARDWARE_BOARD
from hethub.telemetry.boards.panels import Board, board_json
from hethub.telemetry.boards.run import RUN_BOARD
from hethub.telemetry.boards.waits import WAITS_BOARD

__all__ = ["BOARDS", "Board", "board_json"]

BOARDS = (RUN_BOARD, WAITS_BOARD, HARDWARE_BOARD)
