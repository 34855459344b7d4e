"""A completion endpoint on loopback: a real model behind ``/v1/completions`` with echo, log-probabilities, seeds."""

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tasks.loopback import Loopback


class CompletionServer(Loopback):
    """Serves the model of a folder; ``spoil(body, attempt)`` may give (status, text) in place of an answer."""

    def __init__(self, folder, spoil=lambda body, attempt: None):
        super().__init__()
        self.model, self.tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        self.spoil = spoil

    def respond(self, body, before):
        status, text = self.spoil(body, before) or (200, json.dumps(self.answer(body)))
        return status, {}, text

    @torch.inference_mode()
    def answer(self, body):
        """One choice for each prompt of token ids."""
        prompts = body["prompt"]
        choices = [{"index": index, **self.complete(prompt, body)} for index, prompt in enumerate(prompts)]
        return {"object": "text_completion", "model": body["model"], "choices": choices}

    def complete(self, prompt, body):
        tokens, made = list(prompt), []
        generator = torch.Generator().manual_seed(body["seed"])
        for _ in range(body["max_tokens"]):
            logits = self.model(torch.tensor([tokens])).logits[0, -1]
            if body["temperature"]:
                chances = torch.softmax(logits / body["temperature"], -1)
                token = int(torch.multinomial(chances, 1, generator=generator))
            else:
                token = int(logits.argmax())
            if token == self.tokenizer.eos_token_id:
                if not body.get("echo"):
                    break
            tokens.append(token)
            made.append(token)
            text = self.tokenizer.decode(made, skip_special_tokens=True)
            if stops := [stop for stop in body.get("stop") or [] if stop in text]:
                return {"text": text[: min(map(text.index, stops))], "finish_reason": "stop"}
        if not body.get("echo"):
            return {"text": self.tokenizer.decode(made, skip_special_tokens=True), "finish_reason": "length"}
        table = torch.log_softmax(self.model(torch.tensor([tokens])).logits[0], -1)
        own, best = [None], [None]
        for place, token in enumerate(tokens[1:]):
            top = int(table[place].argmax())
            own.append(float(table[place, token]))
            best.append({str(one): float(table[place, one]) for one in {top, token}})
        logprobs = {"tokens": [*map(str, tokens)], "token_logprobs": own, "top_logprobs": best}
        return {"text": self.tokenizer.decode(tokens), "logprobs": logprobs, "finish_reason": "length"}
