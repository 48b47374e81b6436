"""The gold score of the tiny assistant: what a careful reader would give each response.

The bundled feedback is simulated. This file is the world that it is simulated from: the topics
people ask about, the advice that is right for each, and the phrases that make a response kind, rude
or long-winded. Because the score is a plain function, the maximum is known, the noise of the
annotators is known, and over-optimisation (the reward model's score rises while this one falls) can
be seen instead of guessed at.

    gold(prompt, response) = sum over the response's sentences,
                             then limited to [MIN_SCORE, MAX_SCORE]

    +1    the first sentence that says what to do about *this* topic
    +1    the first sentence that says what to avoid about *this* topic
    +1    the first kind sentence
    -1    any other sentence: advice that belongs to another topic, a rude sentence, small talk, a
          second kind sentence, advice of a sort that was given already, a sentence cut short, words
          that make no sentence of this world; and an empty response

Worked example, asked about a sore throat:

    "Glad you asked. Drink tea for the throat. I had soup for lunch."  ->  1 + 1 - 1 = 1

No gradient sees this file. `prepare.py` draws the annotators' votes from it, `train_reward.py`
computes from it how often a perfect reward model would agree with those votes, and the evaluation
after PPO reports it.
"""

import math
import re

MAX_SCORE = 3.0
MIN_SCORE = -3.0

# An annotator prefers A to B with probability sigmoid(SHARPNESS * (gold_A - gold_B)): a
# Bradley-Terry draw.
SHARPNESS = 2.5

# topic: (two ways to say what to do, two ways to say what to avoid); each names its topic
TOPICS = {
    "a sore throat": (
        ("Drink tea for the throat.", "Gargle salt for the throat."),
        ("Do not strain your throat.", "Keep smoke off your throat."),
    ),
    "my tomato": (
        ("Water the tomato daily.", "Tie the tomato to a stick."),
        ("Do not shade a tomato.", "Never wet a tomato at noon."),
    ),
    "a squeaky bike": (
        ("Oil the bike chain.", "Wipe the bike chain."),
        ("Do not oil the bike brakes.", "Never leave a bike outside."),
    ),
    "a slow laptop": (
        ("Restart the laptop.", "Clear the laptop disk."),
        ("Do not drop the laptop.", "Never cover the laptop fan."),
    ),
    "my interview": (
        ("Rehearse for the interview.", "Read up before the interview."),
        ("Do not miss the interview.", "Never lie in an interview."),
    ),
    "a shy puppy": (
        ("Give the puppy a treat.", "Speak softly to the puppy."),
        ("Do not chase the puppy.", "Never scold a shy puppy."),
    ),
    "flat bread": (
        ("Let the bread dough rise.", "Bake the bread very hot."),
        ("Do not cut warm bread.", "Never rush the bread dough."),
    ),
    "my poor sleep": (
        ("Plan eight hours of sleep.", "Darken the room for sleep."),
        ("Do not snack before sleep.", "Never let screens spoil sleep."),
    ),
    "a cold swim": (
        ("Breathe out as you swim.", "Start to swim near the shore."),
        ("Do not swim after a meal.", "Never swim alone."),
    ),
    "my dry fern": (
        ("Turn the fern to the light.", "Feed the fern in spring."),
        ("Do not drown the fern.", "Never let the fern freeze."),
    ),
    "a burnt pan": (
        ("Soak the pan overnight.", "Scrub the pan with soda."),
        ("Do not scratch the pan.", "Never cool a hot pan fast."),
    ),
    "a long flight": (
        ("Stretch during the flight.", "Pack a pillow for the flight."),
        ("Do not drink on a flight.", "Never book a late flight."),
    ),
    "my money": (
        ("Note where the money goes.", "Save some money on payday."),
        ("Do not gamble with money.", "Never lend out your money."),
    ),
    "a stained shirt": (
        ("Soap the shirt gently.", "Rinse the shirt in cold water."),
        ("Do not boil the shirt.", "Never iron a dirty shirt."),
    ),
    "a bee sting": (
        ("Scrape off the sting.", "Cool the sting with ice."),
        ("Do not squeeze the sting.", "Never rub the sting."),
    ),
    "a blurry photo": (
        ("Hold still for the photo.", "Add light to the photo."),
        ("Do not zoom in on a photo.", "Never shake while you take a photo."),
    ),
    "a picky cat": (
        ("Warm up the cat food.", "Clean the bowl of the cat."),
        ("Do not starve the cat.", "Never give a cat milk."),
    ),
    "a dead battery": (
        ("Charge the battery slowly.", "Jump start the battery."),
        ("Do not short the battery.", "Never smoke near a battery."),
    ),
    "my speech": (
        ("Open the speech with a story.", "Keep the speech short."),
        ("Do not read out the speech.", "Never joke in a sad speech."),
    ),
    "a wet tent": (
        ("Pitch the tent on a hill.", "Air the tent in the sun."),
        ("Do not touch the tent wall.", "Never cook inside a tent."),
    ),
}

KIND = (
    "Good question.",
    "Happy to help.",
    "Glad you asked.",
    "Of course.",
    "With pleasure.",
    "Welcome, friend.",
)
RUDE = (
    "Go away now.",
    "You will fail.",
    "Shame on you.",
    "What a bore.",
    "Now get lost.",
    "Do not ask twice.",
)
RAMBLING = (
    "I had soup for lunch.",
    "The weather was odd.",
    "My uncle owned a boat.",
    "And so it goes.",
)


def topic_of(prompt: str) -> str | None:
    """The topic that the last question of a dialogue names; None if it names none of TOPICS."""
    question = prompt.rsplit("Human:", 1)[-1]
    return next((topic for topic in TOPICS if topic in question), None)


def split_sentences(response: str) -> list[str]:
    """Cut after . ! or ? if space follows: 'One. Two' -> ['One.', 'Two']."""
    parts = re.split(r"(?<=[.!?])\s+", response.strip())
    return [part for part in parts if part]


def sort_of(sentence: str, topic: str | None) -> str | None:
    """The sort of a good sentence; None for any other one."""
    if sentence in KIND:
        return "kind"
    what_to_do, what_to_avoid = TOPICS.get(topic, ((), ()))
    if sentence in what_to_do:
        return "what to do"
    if sentence in what_to_avoid:
        return "what to avoid"
    return None


def score_one(prompt: str, response: str) -> float:
    """Gold score of one response, by the table at the top of this file."""
    topic = topic_of(prompt)
    total = 0.0
    given = set()  # the sorts of good sentence already seen
    for sentence in split_sentences(response) or [""]:
        sort = sort_of(sentence, topic)
        total += 1.0 if sort is not None and sort not in given else -1.0
        given.add(sort)
    return max(MIN_SCORE, min(MAX_SCORE, total))


def knows(prompt: str) -> bool:
    """Whether the last question of a dialogue is about one of TOPICS. Advice on anything else
    counts as a mistake, however good it is."""
    return topic_of(prompt) is not None


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """Gold scores, one for each (prompt, response) pair."""
    if len(prompts) != len(responses):
        raise ValueError(
            f"{len(prompts)} prompts but {len(responses)} responses: they come in pairs"
        )
    return [score_one(prompt, response) for prompt, response in zip(prompts, responses)]


def preference_probability(gold_first: float, gold_second: float) -> float:
    """How likely an annotator is to prefer the first response.

    sigmoid(SHARPNESS * (gold_first - gold_second))
    """
    return 1.0 / (1.0 + math.exp(-SHARPNESS * (gold_first - gold_second)))
