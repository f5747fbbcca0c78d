#!/usr/bin/env python3
"""Generator of short, coherent English stories (pure standard library, deterministic).

Document number `i` of a split depends on the pair (split, i) alone, so any range can be
made by any process. Splits have disjoint seeds, and one in 25 pairs of hero's name and
place is reserved: it never occurs in the training or calibration split, and half of the
held-out documents use such a pair.

    python stories.py --split heldout --bytes 250000 --out heldout.txt
    python stories.py --split train --count 3 --chat-share 0.5
"""

import argparse
import random
import re
import sys
import zlib
from functools import lru_cache

import story_words as words
from story_plots import PLOTS, SHARED

END_OF_TEXT = "<|endoftext|>"
SPLITS = {"train": 1, "calibration": 2, "heldout": 3, "tokenizer": 4}
RESERVED_ONE_IN = 25

PRONOUNS = {"m": ("he", "him", "his", "himself"), "f": ("she", "her", "her", "herself")}
SINGULAR = {"hands": "hand", "paws": "paw", "wings": "wing", "feet": "foot", "hooves": "hoof", "claws": "claw"}
WEATHER_ADJECTIVES = {"sunny": ["sunny", "bright", "warm", "fine"], "windy": ["windy", "breezy"], "cloudy": ["cloudy", "gray", "cool"],
                      "misty": ["misty", "foggy"], "rain": ["rainy", "wet"]}
SIGHTS = ["[A] {saw|looked at|noticed} [sight1]{| and smiled}.", "[He] saw [sight1] and [sight2].", "Along the way, [he] saw [sight1]."]

NATURE = {"the park", "the forest", "the meadow", "the garden", "the farm", "the hill", "the river", "the lake", "the orchard", "the valley"}
TREES = NATURE | {"the playground", "the village square", "the schoolyard"}
OUTDOORS = TREES | {"the beach", "the harbor"}
PLOT_PLACES = {"stuck": TREES, "build": OUTDOORS, "lost_baby": NATURE, "garden": {"the park", "the meadow", "the garden", "the farm", "the hill", "the orchard", "the valley"},
               "race": OUTDOORS, "errand": NATURE | {"the village square", "the harbor"}}
FEAR_PLACES = {"deep water": {"the lake", "the river", "the beach"}, "the tall slide": {"the playground", "the park"}, "the old bridge": {"the river", "the valley", "the forest"},
               "high places": {"the hill", "the forest", "the playground", "the valley", "the harbor"}, "thunder": OUTDOORS, "big dogs": OUTDOORS | {"the market"},
               "the dark": OUTDOORS | {"the barn"}}

# Plots whose only day is the one that the shared step sets, so that the opening may set it.
DAY_OPENING_PLOTS = ("lost_object", "found_object", "new_friend", "lost_baby")

# What a request may ask of the story, and what may be asked about it afterwards.
TOPICS = {
    "lost_object": ["who loses a [O]", "and a lost [o]"], "found_object": ["who finds a [O]", "and a [O] that belongs to someone else"],
    "sharing": ["who learns to share", "who shares [food] with a friend"], "fear": ["who is afraid of [fear]", "who learns to be brave"],
    "stuck": ["whose [O] gets stuck in a tree", "and a [O]"], "build": ["who builds a [build]", "who wants to build a [build]"],
    "new_friend": ["who meets a new friend named [B]", "who is lonely and finds a friend"], "lost_baby": ["who finds a lost [baby]", "who helps a little [baby]"],
    "broken": ["who breaks a [brk]", "who learns to tell the truth"], "garden": ["who plants a seed", "who grows a [plant]"],
    "gift": ["who makes a [O] for [P]", "who needs a birthday present"], "noise": ["who hears [noise]", "and a mysterious noise"],
    "race": ["who runs in a race", "and a big race"], "errand": ["who helps a tiny [tiny]", "who takes [food] to [r2]"],
}
QUESTIONS = {
    "lost_object": ("What did [A] lose?", "[A] lost a [O]."), "found_object": ("What did [A] find?", "[A] found a [O] [s1]."),
    "sharing": ("What did [A] share?", "[A] shared [food] with [B]."), "fear": ("What was [A] afraid of?", "[A] was afraid of [fear]."),
    "stuck": ("What got stuck in the tree?", "The [O] got stuck in the tree."), "build": ("What did [A] build?", "[A] built a [build] with [B]."),
    "new_friend": ("Who became [A]'s friend?", "[B] became [A]'s friend."), "lost_baby": ("What did [A] find?", "[A] found a little [baby]."),
    "broken": ("What did [A] break?", "[A] broke the [brkadj] [brk]."), "garden": ("What grew from the seed?", "A [plant] grew from the seed."),
    "gift": ("What did [A] make?", "[A] made a [O] for [P]."), "noise": ("What was the noise?", "It was [noiseis]."),
    "race": ("What was the prize?", "The prize was a [O]."), "errand": ("Who helped [A]?", "A tiny [tiny] helped [A]."),
}


@lru_cache(maxsize=None)
def parse(template):
    """Splits a template into text, ("slot", name), ("step", name) and ("choice", templates)."""
    parts, text, i = [], "", 0
    while i < len(template):
        c = template[i]
        if c == "[":
            j = template.index("]", i)
            parts += [text, ("slot", template[i + 1:j])]
            text, i = "", j + 1
        elif c == "<" and template[i + 1].isupper():
            j = template.index(">", i)
            parts += [text, ("step", template[i + 1:j])]
            text, i = "", j + 1
        elif c == "{":
            depth, j, start, options = 1, i + 1, i + 1, []
            while depth:
                if template[j] == "{":
                    depth += 1
                elif template[j] == "}":
                    depth -= 1
                if (template[j] == "|" and depth == 1) or depth == 0:
                    options.append(template[start:j])
                    start = j + 1
                j += 1
            parts += [text, ("choice", tuple(options))]
            text, i = "", j
        else:
            text += c
            i += 1
    parts.append(text)
    return tuple(p for p in parts if p)


class Story:
    """The facts of one story and the expansion of templates over them."""

    def __init__(self, rng, split, want_reserved):
        self.rng = rng
        self.plot = rng.choice(list(PLOTS))
        self.facts = {}
        self.used = set()
        self._cast(split, want_reserved)
        self._props()

    def _pick_name(self, kind, gender, taken):
        while True:
            kind_of_name = self.rng.random()
            if kind_of_name < 0.07:
                name = self.rng.choice(words.GIRL_NAMES + words.BOY_NAMES + words.ANIMAL_NAMES) + self.rng.choice(words.NAME_ENDINGS)
            elif kind_of_name < 0.2:
                middle = "".join(self.rng.choice(words.SYLLABLE_MIDDLE) for _ in range(self.rng.choice([1, 1, 2])))
                name = self.rng.choice(words.SYLLABLE_START) + middle + self.rng.choice(words.SYLLABLE_END)
            elif kind == "animal" and self.rng.random() < 0.7:
                name = self.rng.choice(words.ANIMAL_NAMES)
            else:
                name = self.rng.choice(words.GIRL_NAMES if gender == "f" else words.BOY_NAMES)
            if name not in taken:
                return name

    def _person(self, prefix, gender):
        he, him, his, himself = PRONOUNS[gender]
        self.facts.update({prefix + "he": he, prefix + "him": him, prefix + "his": his, prefix + "himself": himself})

    def _cast(self, split, want_reserved):
        rng, f = self.rng, self.facts
        fear = rng.choice(words.FEARS)
        child = rng.random() < 0.6 or (self.plot == "fear" and fear[0] == "big dogs")
        gender = rng.choice("mf")
        allowed = PLOT_PLACES.get(self.plot) or (FEAR_PLACES.get(fear[0]) if self.plot == "fear" else None)
        places = [p for p in words.PLACES if allowed is None or p[0] in allowed]
        while True:
            name, place = self._pick_name("child" if child else "animal", gender, ()), rng.choice(places)
            reserved = is_reserved(name, place[0])
            if reserved == want_reserved or (split == "heldout" and not want_reserved):
                break
        f["A"] = name
        self._person("", gender)
        species = None if child else rng.choice(words.ANIMALS)
        f["noun"] = self._child_noun(gender) if child else species[0]
        f["hands"] = "hands" if child else species[1]
        f["hand"] = SINGULAR[f["hands"]]
        f["place"], f["pin"] = place[0], f"{place[1]} {place[0]}"
        if child:
            f["home"] = f"a {rng.choice('small cozy white yellow tall little stone wooden'.split())} {rng.choice('house cottage farmhouse house'.split())} {rng.choice(['near', 'not far from', 'close to'])} {place[0]}"
        else:
            f["home"] = f"{species[2]} {rng.choice(['near', 'not far from', 'close to'])} {place[0]}"
        f["s1"], f["s2"], f["s3"] = rng.sample(place[2], 3)
        f["sight1"], f["sight2"] = rng.sample(place[3], 2)
        f["fear"], f["fmoment"], f["fstep1"], f["fstep2"], f["fresult"] = fear
        self._friend(child, species)
        self._relatives()

    def _child_noun(self, gender):
        if self.rng.random() < 0.07:
            return "princess" if gender == "f" else "prince"
        return "girl" if gender == "f" else "boy"

    def _friend(self, child, species):
        rng, f = self.rng, self.facts
        b_child = child and rng.random() < 0.75
        b_gender = rng.choice("mf")
        f["B"] = self._pick_name("child" if b_child else "animal", b_gender, (f["A"],))
        self._person("b", b_gender)
        if b_child:
            f["bnoun"] = "girl" if b_gender == "f" else "boy"
            f["Bfriend"] = rng.choice(["[his] friend [B]", "[his] {good|best} friend [B]", "[his] neighbor [B]", "[B], a [bnoun] from next door,", "[his] cousin [B]", "[B], [his] {best |good |}friend,"])
        else:
            other = rng.choice([a for a in words.ANIMALS if species is None or a[0] != species[0]])
            f["bnoun"] = other[0]
            f["Bfriend"] = rng.choice(["[his] friend [B], {a|the} [bnoun],", "[B] the [bnoun]", "[his] {good|best|old} friend [B] the [bnoun]", "a {friendly|kind} [bnoun] named [B]"])
        f["Bnew"] = rng.choice(["a {little|young|small} [bnoun] named [B]", "a [bnoun] {named|called} [B]"])
        f["bthe"] = "the"
        f["btrait"] = rng.choice(words.TRAITS)
        f["brel"] = rng.choice(words.RELATIVES)[0]

    def _relatives(self):
        rng, f = self.rng, self.facts
        word, call, gender = rng.choice(words.RELATIVES)
        f["P"], f["Pword"], f["Pcall"] = f"[his] {word}", word, call
        self._person("p", gender)
        other, _, gender = rng.choice([r for r in words.RELATIVES if r[1] != call and "r" in r[0]])
        f["r2"], f["r2word"] = f"[his] {other}", other
        self._person("r2", gender)
        (intro, short, gender), (intro2, short2, gender2) = rng.sample(words.ELDERS, 2)
        f["Ei"], f["E"] = intro + ("," if "," in intro else ""), short
        self._person("e", gender)
        f["E2i"], f["E2"] = intro2 + ("," if "," in intro2 else ""), short2
        self._person("e2", gender2)

    def _props(self):
        rng, f = self.rng, self.facts
        objects = [o for o in words.OBJECTS if self.plot != "stuck" or o[0] in words.LIGHT_OBJECTS]
        noun, use, unfit = rng.choice(objects)
        fitting = [a for a in words.COLORS + words.COLORS + words.QUALITIES if a not in unfit.split()]
        adjective = rng.choice(fitting)
        if adjective in words.COLORS and rng.random() < 0.2:
            extra = rng.choice([a for a in words.QUALITIES if a not in unfit.split() and a != "bright"])
            adjective = f"{adjective} {extra}" if extra in ("wooden", "striped") else f"{extra} {adjective}"
        f["o"], f["O"], f["use"] = noun, f"{adjective} {noun}", use
        (f["foodfull"], f["food"], _), (f["food2full"], _, _) = rng.sample(words.FOODS, 2)
        f["baby"], f["parent"], f["where"] = rng.choice(words.BABIES)
        f["build"], f["materials"], f["bfail1"], f["bfail2"], f["buse"] = rng.choice(words.BUILDS)
        f["game"] = rng.choice(words.GAMES)
        f["plant"], f["plantsize"] = rng.choice(words.PLANTS)
        f["brk"], f["brkadj"] = rng.choice(words.BREAKABLES)
        f["noise"], f["noiseis"] = rng.choice(words.NOISES)
        f["tiny"], f["tinypart"] = rng.choice(words.SMALL_HELPERS)
        f["trait"], f["trait2"] = rng.sample(words.TRAITS, 2)
        f["hobby"], f["hobby2"] = rng.sample(words.HOBBIES, 2)
        weather = rng.choice(list(words.WEATHER) + ["sunny", "sunny"])
        if self.plot == "stuck":
            weather = "windy"
        elif self.plot == "fear" and f["fear"] == "thunder":
            weather = rng.choice(["windy", "cloudy", "rain"])
        f["wday"] = rng.choice(WEATHER_ADJECTIVES[weather])
        f["wx"] = rng.choice(words.WEATHER[weather][0])
        f["wxend"] = rng.choice(words.WEATHER[weather][1])
        f["sight"] = rng.choice(SIGHTS)
        f["lesson"] = rng.choice(PLOTS[self.plot]["lessons"])
        f["memory"] = rng.choice(PLOTS[self.plot]["memory"])

    def _slot(self, name):
        if name in ("wx", "Sight"):  # said at most once in a story
            if name in self.used:
                return ""
            self.used.add(name)
        if name in self.facts:
            return self.expand(self.facts[name])
        value = self.expand(self.facts[name[0].lower() + name[1:]])
        return capital(value)

    def _step(self, name):
        if name == "OPEN" and self.plot in DAY_OPENING_PLOTS and self.rng.random() < 0.25:
            name = "OPEN_DAY"
            self.used.add("day")
        elif name == "DAY" and "day" in self.used:
            name = "DAY_SAME"
        fresh = [t for t in SHARED[name] if (name, t) not in self.used]
        choice = self.rng.choice(fresh)
        if choice:
            self.used.add((name, choice))
        return self.expand(choice)

    def expand(self, template):
        out = []
        for part in parse(template):
            if isinstance(part, str):
                out.append(part)
            elif part[0] == "slot":
                out.append(self._slot(part[1]))
            elif part[0] == "step":
                out.append(self._step(part[1]))
            else:
                out.append(self.expand(self.rng.choice(part[1])))
        return "".join(out)

    def line(self, template):
        return tidy(self.expand(template))

    def tell(self):
        """The story as text, paragraphs separated by a newline."""
        paragraphs = []
        for steps in PLOTS[self.plot]["paragraphs"]:
            text = tidy(" ".join(capital(self.expand(self.rng.choice(step)).lstrip()) for step in steps))
            if text:
                paragraphs.append(text)
        return "\n".join(paragraphs)


def capital(text):
    return text[:1].upper() + text[1:]


def tidy(text):
    """Spacing, sentence capitals, a/an, and the comma that closes an apposition."""
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r" ([.,!?])", r"\1", text)
    text = re.sub(r",([.,!?])", r"\1", text)
    text = re.sub(r"\b([Aa]) (?=[aeiouAEIOU])(?!uni|use|one )", r"\1n ", text)
    return re.sub(r"(^|[.!?] )([a-z])", lambda m: m.group(1) + m.group(2).upper(), text)


def is_reserved(name, place):
    """True for the pairs of name and place kept out of training."""
    return zlib.crc32(f"{name}|{place}".encode()) % RESERVED_ONE_IN == 0


def new_story(split, index):
    rng = random.Random((SPLITS[split] << 40) | index)
    return Story(rng, split, split == "heldout" and index % 2 == 0)


def plain_document(split, index):
    return new_story(split, index).tell()


def _request(story):
    rng = story.rng
    who = rng.choice(["a [noun] named [A]", "a {little|young} [noun] {named|called} [A]", "[A] the [noun]", "a [trait] [noun] named [A]"])
    about = who + " " + rng.choice(TOPICS[story.plot]) if rng.random() < 0.65 else who
    if rng.random() < 0.15:
        about += rng.choice([" [pin]", ". It should {take place|happen} [pin]"])
    form = rng.choice(["Tell me a {|short |little |nice |bedtime }story about " + about + ".", "{Please write|Write|Please tell me|Can you tell me} a {|short |little |happy }story about " + about + ".",
                       "I would like {to hear |}a story about " + about + "{, please|}.", "A story about " + about + "{, please|}.", "Can you write a story about " + about + "?",
                       "tell me a story about " + about, "{Please tell|Tell} me a {|short |little |bedtime }story.", "Make up a story about " + about + "."])
    text = story.line(form)
    return text[0].lower() + text[1:] if form.startswith("tell") else text


def _follow_up(story):
    rng = story.rng
    pairs = [QUESTIONS[story.plot], ("What did [A] learn?", "[A] learned that [lesson]."), ("Who was the story about?", "The story was about a [noun] named [A]."),
             ("Where did the story {happen|take place}?", "It happened [pin].")]
    if story.plot != "errand":
        pairs.append(("{What was the name of [A]'s friend|Who was [A]'s friend}?", "[A]'s friend was {called|named} [B]."))
    return rng.sample(pairs, rng.choice([1, 1, 2]))


def chat_messages(split, index):
    """A conversation of (role, text) pairs in which the assistant tells a story."""
    story = new_story(split, index)
    rng = story.rng
    messages = []
    if rng.random() < 0.25:
        messages.append(("system", rng.choice(["You are a friendly storyteller.", "You tell short stories for children.", "You are a helpful assistant.", "You write simple stories with a happy ending."])))
    if rng.random() < 0.06:
        messages += [("user", rng.choice(["Hello!", "Hi", "Hi there!", "Good morning!", "Hello, who are you?"])),
                     ("assistant", rng.choice(["Hello! Would you like to hear a story?", "Hello! I tell stories. What should the story be about?"]))]
    if rng.random() < 0.12:
        text = story.tell()
        cut = [m.end() for m in re.finditer(r"[.!?]\"?(?=\s)", text)]
        at = cut[rng.choice([0, 0, 1, 2])]
        messages += [("user", rng.choice(["Continue this story: ", "Please finish the story: ", "How does this story go on? "]) + text[:at]), ("assistant", text[at:].strip())]
    else:
        messages.append(("user", _request(story)))
        messages.append(("assistant", story.tell()))
    if rng.random() < 0.35:
        for question, answer in _follow_up(story):
            messages += [("user", story.line(question)), ("assistant", story.line(answer))]
    return messages


def render_chat(messages):
    """The text form of a conversation; the tokenizer's chat template makes the same."""
    return "".join(f"<|{role}|>\n{text}" + (END_OF_TEXT if role == "assistant" else "\n") for role, text in messages)


def document(split, index, chat_share):
    """Document `index` of a split, with its end-of-text mark."""
    if random.Random((SPLITS[split] << 41) | index | (1 << 60)).random() < chat_share:
        return render_chat(chat_messages(split, index))
    return plain_document(split, index) + END_OF_TEXT


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=sorted(SPLITS), required=True)
    parser.add_argument("--start", type=int, default=0, help="first document number")
    parser.add_argument("--count", type=int, help="number of documents")
    parser.add_argument("--bytes", type=int, help="stop at this size")
    parser.add_argument("--chat-share", type=float, default=0.0)
    parser.add_argument("--out", help="file to write (standard output if absent)")
    args = parser.parse_args()
    if args.count is None and args.bytes is None:
        parser.error("give --count or --bytes")
    out = open(args.out, "w", encoding="utf-8") if args.out else sys.stdout
    written, index = 0, args.start
    while (args.count is None or index < args.start + args.count) and (args.bytes is None or written < args.bytes):
        text = document(args.split, index, args.chat_share)
        out.write(text)
        written += len(text.encode())
        index += 1
    if args.out:
        out.close()


if __name__ == "__main__":
    main()
