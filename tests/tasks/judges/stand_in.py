"""A chat-completions endpoint on loopback that answers as a script says."""

import json

from tests.tasks.loopback import Loopback


class StandIn(Loopback):
    """``script`` gets the material that is judged, and how often it was asked before; it gives (status, headers, text).

    With status 200 the text is the reply; with another it is the body as it is sent. A script may block.
    """

    def __init__(self, script):
        super().__init__()
        self.script = script

    def about(self, body):
        return _material(body)["response"]

    def respond(self, body, before):
        status, headers, text = self.script(_material(body), before)
        if status == 200:
            text = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})
        return status, headers, text


def _material(body):
    return json.loads(body["messages"][-1]["content"])


YES = '{"verdict": "yes", "rationale": "It declines."}'
NO = '{"verdict": "no", "rationale": "It answers."}'


def honest(material, before):
    """Judges by the word "cannot"."""
    return 200, {}, YES if "cannot" in material["response"] else NO
