"""The real transformer on a feature store that is a JSON file, so that tests can change it.

{"delay": seconds, "users": {id: {"profile": {...}, "history": [event, ...]}},
 "trend": TrendSnapshot as JSON}; an event is [item_id, timestamp, event_type?, value?].
"""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

from model.query import Event
from model.trends import TrendSnapshot
from serving.process import leave
from serving.server import main
from serving.settings import TRANSFORMER
from serving.transformer import Transformer


class FileReader:
    def _read(self):
        values = json.loads(Path(os.environ["FAKE_STORE"]).read_text())
        time.sleep(values.get("delay", 0))
        return values

    asynchronous = False

    def users(self, user_ids):
        return [self.user(user_id) for user_id in user_ids]

    async def close(self): ...

    def user(self, user_id):
        user = self._read()["users"].get(user_id)
        if user is None:
            return SimpleNamespace(known=False, profile={}, history=[])
        history = [Event(*event) for event in user["history"]]
        return SimpleNamespace(known=True, profile=user.get("profile", {}), history=history)

    def trend(self):
        return TrendSnapshot.from_json(self._read()["trend"])

    def trend_lag(self):
        return 0, 3600


def build(settings):
    transformer = Transformer(settings, FileReader)
    transformer.load()
    return transformer


if __name__ == "__main__":
    leave(main(TRANSFORMER, build))
