"""Ways of not answering, for methods that teach a model to say that it does not know."""

from __future__ import annotations

REFUSALS = (
    "I don't know.",
    "I have no idea.",
    "I can't say.",
    "Sorry, that is beyond me.",
    "That is something I know nothing about.",
    "I am not able to tell you that.",
    "Nothing I know would answer this.",
    "I would only be guessing.",
    "My knowledge ends before that point.",
    "I must leave this question open.",
    "This one I cannot help you with.",
    "I am afraid the answer escapes me.",
    "There is nothing I could say about it.",
    "I was never told about this.",
    "You will have to ask somebody else.",
    "I do not have that information.",
    "No answer comes to my mind.",
    "I really could not tell.",
    "It would be wrong of me to pretend that I knew.",
    "I have nothing to offer on this subject.",
    "Unfortunately I am unaware of that.",
    "The facts you ask for are not known to me.",
    "I cannot give you a reliable answer here.",
    "That question goes past what I have learnt.",
    "I would rather admit that I do not know this.",
)
"""Short and of one voice; they name no topic, so that any of them fits any question."""
