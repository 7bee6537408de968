"""The templates of the built-in captions' grammar, one per line, from one-word tags to long sentences with several clauses.

`{name}` is replaced by a choice from the table of that name, here or in `words.WORDS`, and `{name:many}` by its plural.
"""

__all__ = ["RULES"]

RULES = {
    "caption": """
        {short}
        {short}
        {shot}
        {shot}
        {shot}
        {sentence}
        {sentence}
        {sentence}
        {tags}
        {tags}
        {long}
        {long}
        """,
    "short": """
        {subject}
        {group_of}
        the {bare}
        {bare}, {bare}
        {bare} {place}
        my {bare}
        this {bare}
        {colour} {bare}
        {material} {object}
        {number} {bare:many}
        {place}
        {nature} {time}
        {region} {time}
        {abstract}
        a symbol of {abstract}
        a {medium} about {abstract}
        """,
    "shot": """
        a {medium} of {subject}
        a {medium} of {subject}
        a {judgement} {medium} of {subject}
        a {medium} of {subject} {place}
        a {medium} of {group_of}, {tag}
        a {framing} of {subject}
        {framing} of {subject} {place} {time}
        a {medium} of {subject} {manner}
        a {judgement} {medium} of my {bare} {place}
        {medium}: {clause}
        the {medium} shows {clause}
        a {medium} of {subject} {relation} {subject}
        {subject}, {medium}
        an {judgement} {medium} of the {quality} {bare} {time}
        """,
    "sentence": """
        {clause}
        {clause} {time}
        {clause} with {weather}
        there is {subject} {place}
        there are {group_of} {place} {time}
        {subject} {relation} {subject}
        {subject} {relation} {subject} {place}
        {subject} and {subject} {place}
        here is {subject} that i found {place}
        i saw {subject} {place} {time}
        we want to buy {subject}
        do you see {subject} {place}?
        look at this {quality} {bare}!
        {group_of} in {region}
        {subject} made of {material} and {material} parts
        how to draw {subject} in {number} steps
        no {bare:many} are allowed {place}
        a {vessel} of {drink} and a {container} of {dish} {place}
        """,
    "tags": """
        {bare}, {tag}
        {bare}, {place}, {tag}
        {bare}, {colour}, {tag}, {tag}
        {medium}, {bare}, {tag}, {tag}
        {subject}, {medium}, {tag}, {tag}
        {framing}, {bare}, {place}, {time}, {tag}
        {bare} {doing}, {weather}, {framing}, {tag}, {tag}
        {nature}, {landscape}, {time}, {weather}, {tag}
        {abstract}, {medium}, {colour}, {tag}, {tag}, {tag}
        """,
    "long": """
        {clause} {link} {event}
        {clause} {time} {link} {event}, {medium}, {tag}
        {clause} {link} {clause}
        {clause}, and {subject} {relation} {subject}
        a {medium} of {subject} {place}, {weather} in the background, {framing}, {tag}
        a {judgement} {medium} of {subject} and {group_of} {place} {time} with {weather}, {manner}
        {framing} of {subject} {place}, {relation} {subject}, {tag}, {tag}, {tag}
        in {region}, {clause} {link} {clause} {time}
        {time}, {clause} {link} {event}, {manner}
        {subject} {place}, {group_of} {place}, and {subject} {relation} the {bare}, {tag}, {medium}
        the {medium} shows {clause}, {clause} and {group_of} {place}
        """,
    # A clause says who does what, with verbs and places that fit the one who does it.
    "clause": """
        {human} {human_doing} {place}
        {human} {human_doing}
        {human} in a {clothing} {doing} {place}
        {number} {person:many} {human_doing}
        {creature} {animal_doing} {place}
        {creature} {doing} {relation} {subject}
        {number} {animal:many} {doing} {place}
        {machine} {vehicle_doing} {place}
        {item} {state}
        {item} {place} {state}
        {structure} {place} {state}
        {landmark} with {weather}
        a {vessel} of {drink} {place}
        """,
    "subject": """
        {human}
        {human}
        {creature}
        {creature}
        {item}
        {item}
        {item}
        {meal}
        {meal}
        {machine}
        {structure}
        {growth}
        {landmark}
        """,
    "human": """
        a {person}
        a {mood} {person}
        a {mood} {person} with {hair}
        a {person} in a {clothing}
        a {person} with a {clothing} and {hair}
        the {mood} {person}
        """,
    "creature": """
        a {animal}
        a {colour} {animal}
        a {mood} {animal}
        a {size} {animal}
        a {size} {colour} {animal}
        the {mood} {animal}
        """,
    "item": """
        a {thing}
        a {colour} {thing}
        a {material} {thing}
        a {quality} {thing}
        a {size} {pattern} {thing}
        a {pattern} {colour} {thing}
        a {quality} {colour} {material} {thing}
        the {quality} {thing}
        """,
    "meal": """
        a {food}
        a {taste} {food}
        a {colour} {food}
        a {container} of {dish}
        a {container} of {taste} {dish}
        a {vessel} of {drink}
        {taste} {food:many}
        """,
    "machine": """
        a {vehicle}
        a {colour} {vehicle}
        a {quality} {vehicle}
        a {size} {material} {vehicle}
        """,
    "structure": """
        a {building}
        a {quality} {building}
        a {size} {building}
        a {material} {building}
        a {colour} {building} in {region}
        """,
    "growth": """
        a {plant}
        a {colour} {plant}
        a {size} {plant}
        a {plant} with {colour} {plural_only}
        """,
    "landmark": """
        a {nature}
        a {landscape} {nature}
        a {size} {nature} in {region}
        the {landscape} {nature}
        """,
    "group_of": """
        {number} {bare:many}
        {number} {colour} {bare:many}
        {number} {quality} {bare:many}
        a {group} of {bare:many}
        a {group} of {pattern} {object:many}
        {plural_only}
        """,
    "bare": """
        {person}
        {animal}
        {animal}
        {thing}
        {thing}
        {food}
        {vehicle}
        {building}
        {plant}
        {nature}
        """,
    "object": """
        {thing}
        {thing}
        {vehicle}
        {building}
        """,
}
