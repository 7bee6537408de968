"""Captions to encode: a built-in corpus of everyday English, and a reader for corpora of your own.

    from perfusion.captions import everyday_captions, read_captions
    for caption in everyday_captions(3):
        print(caption)

The second moment C = E[e eᵀ] (perfusion.covariance; arXiv 2305.01644, section 3) needs captions that move the text encoder
in every direction it uses: many different words, each in many contexts, at many positions. The built-in corpus therefore
comes from a grammar with a wide vocabulary and templates from one-word tags to long sentences with several clauses.
The grammar is two tables. `WORDS` holds the leaves, comma-separated; `RULES` holds the templates, one per line, where
`{name}` is replaced by a choice from the table of that name and `{name:many}` by its plural.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["EVERYDAY_COUNT", "everyday_captions", "everyday_source", "read_captions"]

EVERYDAY_COUNT = 20_000

WORDS = {
    # ---- who and what -------------------------------------------------------------------------------------------------
    "person": """man, woman, boy, girl, child, baby, toddler, teenager, grandmother, grandfather, bride, groom, chef, baker,
        farmer, fisherman, sailor, pilot, astronaut, doctor, nurse, dentist, teacher, student, professor, scientist, engineer,
        carpenter, plumber, blacksmith, potter, painter, sculptor, photographer, musician, guitarist, violinist, pianist,
        drummer, singer, dancer, ballerina, clown, magician, actor, writer, journalist, librarian, waiter, barista, bartender,
        butcher, shepherd, cowboy, knight, king, queen, prince, princess, wizard, witch, pirate, soldier, police officer,
        firefighter, detective, judge, lawyer, mechanic, gardener, florist, tailor, barber, cyclist, runner, swimmer, surfer,
        skier, skateboarder, climber, hiker, boxer, gymnast, wrestler, golfer, tennis player, basketball player, monk, nun,
        businessman, tourist, traveler, neighbor, beekeeper, lifeguard, mermaid, vampire, samurai, viking, elf, fairy""",
    "animal": """dog, cat, puppy, kitten, corgi, poodle, dachshund, husky, terrier, bulldog, golden retriever, horse, pony,
        donkey, cow, calf, bull, goat, sheep, lamb, pig, piglet, chicken, rooster, duck, duckling, goose, swan, turkey, rabbit,
        hamster, guinea pig, mouse, rat, squirrel, chipmunk, hedgehog, mole, fox, wolf, bear, polar bear, panda, koala,
        kangaroo, sloth, monkey, gorilla, chimpanzee, lion, lioness, tiger, leopard, cheetah, jaguar, lynx, elephant, rhino,
        hippo, giraffe, zebra, camel, llama, alpaca, buffalo, bison, deer, moose, reindeer, antelope, otter, beaver, badger,
        raccoon, skunk, seal, walrus, whale, dolphin, shark, octopus, squid, jellyfish, starfish, crab, lobster, shrimp,
        goldfish, salmon, trout, seahorse, turtle, tortoise, frog, toad, lizard, chameleon, gecko, snake, crocodile, alligator,
        snail, butterfly, moth, bee, wasp, ant, spider, beetle, ladybug, dragonfly, grasshopper, caterpillar, eagle, hawk,
        falcon, owl, parrot, crow, raven, pigeon, dove, sparrow, robin, seagull, pelican, flamingo, peacock, penguin, ostrich,
        stork, hummingbird, woodpecker, bat, dragon, unicorn, dinosaur""",
    "thing": """cup, mug, glass, bottle, jar, bowl, plate, teapot, kettle, coffee pot, pan, spoon, fork, knife, vase, candle,
        lantern, lamp, mirror, clock, alarm clock, wristwatch, pocket watch, book, notebook, newspaper, letter, envelope, map,
        globe, pen, pencil, paintbrush, easel, ruler, stapler, calculator, keyboard, laptop, tablet, smartphone, telephone,
        radio, television, camera, tripod, projector, headphones, microphone, speaker, record player, guitar, violin, cello,
        piano, accordion, trumpet, saxophone, flute, harp, drum, banjo, chair, armchair, rocking chair, stool, bench, sofa,
        couch, bed, cradle, desk, table, bookshelf, wardrobe, drawer, carpet, rug, curtain, pillow, blanket, towel, basket,
        bucket, barrel, box, crate, suitcase, backpack, handbag, purse, wallet, umbrella, hat, cap, helmet, crown, scarf,
        glove, mitten, sock, shoe, sneaker, boot, sandal, slipper, shirt, sweater, jacket, coat, dress, skirt, necktie, belt,
        ring, necklace, bracelet, earring, sunglasses, teddy bear, doll, toy, robot, puppet, kite, balloon, ball, marble,
        puzzle, chessboard, dice, toy train, rubber duck, action figure, music box, snow globe, hammer, screwdriver, wrench,
        saw, drill, ladder, shovel, rake, watering can, flowerpot, broom, mop, sewing machine, typewriter, telescope,
        microscope, compass, hourglass, key, padlock, coin, medal, trophy, flag, sword, shield, bow, axe, anchor, rope, net,
        paddle, surfboard, skateboard, tennis racket, football, basketball, baseball bat, bicycle helmet, fire hydrant, mailbox,
        traffic light, street sign, lamppost, statue, fountain, gravestone, mask, lightbulb, battery, magnet, seashell, feather,
        bone, skull, crystal, gemstone, pebble, soap, toothbrush, comb, scissors, thimble, button, zipper, wheel, gear""",
    "food": """apple, pear, banana, orange, lemon, lime, grapefruit, peach, plum, apricot, cherry, strawberry, raspberry,
        blueberry, grape, melon, watermelon, pineapple, mango, coconut, kiwi, fig, pomegranate, avocado, tomato, cucumber,
        carrot, potato, onion, pepper, pumpkin, zucchini, eggplant, mushroom, radish, turnip, cabbage, cauliflower, artichoke,
        pea pod, corn cob, chili, olive, walnut, almond, peanut, chestnut, egg, pancake, waffle, croissant, bagel, pretzel,
        muffin, cupcake, cookie, doughnut, brownie, pie, tart, birthday cake, wedding cake, sandwich, burger, hot dog, taco,
        burrito, pizza, dumpling, sushi roll, sausage, steak, meatball, roast chicken, candy, lollipop, chocolate bar""",
    "dish": """soup, stew, curry, rice, noodles, pasta, spaghetti, ramen, salad, porridge, cereal, oatmeal, yogurt, ice cream,
        pudding, fruit, berries, nuts, popcorn, french fries, beans, lentils, cheese, olives, shrimp, oysters, chili,
        mashed potatoes, scrambled eggs, whipped cream""",
    "drink": """tea, coffee, milk, water, juice, lemonade, beer, wine, cider, hot chocolate, espresso, smoothie, cocktail,
        champagne, soda""",
    "container": "bowl, plate, pot, basket, tray, jar, pan, bucket, box, table full",
    "vessel": "cup, glass, mug, bottle, pitcher, jug, thermos, carafe",
    "vehicle": """car, sports car, race car, limousine, taxi, van, pickup truck, fire truck, ambulance, police car, bus,
        school bus, tram, train, steam locomotive, subway train, bicycle, tricycle, scooter, motorcycle, tractor, bulldozer,
        excavator, crane, wagon, carriage, sled, canoe, kayak, rowboat, sailboat, yacht, ferry, cruise ship, cargo ship, tugboat,
        submarine, gondola, raft, airplane, biplane, glider, helicopter, hot air balloon, rocket, space shuttle, spaceship, drone,
        tank, snowmobile, hovercraft, wheelchair, stroller, shopping cart""",
    "building": """house, cottage, cabin, hut, villa, mansion, palace, castle, tower, lighthouse, windmill, barn, stable,
        farmhouse, greenhouse, garage, shed, church, chapel, cathedral, mosque, temple, pagoda, synagogue, monastery, school,
        university, library, museum, theater, cinema, opera house, hospital, pharmacy, hotel, restaurant, cafe, bakery,
        bookshop, market, supermarket, factory, warehouse, power plant, skyscraper, apartment block, office building, bridge,
        tunnel, dam, train station, airport, harbor, stadium, prison, fortress, ruin, pyramid, igloo, tent, treehouse,
        phone booth, gas station, observatory, gate, staircase, balcony, chimney""",
    "plant": """tree, oak, pine, birch, willow, maple, palm tree, cherry tree, apple tree, bush, hedge, fern, moss, ivy, cactus,
        succulent, bonsai, bamboo, flower, rose, tulip, daisy, sunflower, lily, orchid, lavender bush, poppy, daffodil, iris,
        lotus, dandelion, thistle, mushroom, vine, reed, leaf, acorn, pinecone, log, stump, bouquet, wreath, potted plant,
        house plant""",
    "nature": """mountain, hill, valley, canyon, cliff, volcano, cave, glacier, iceberg, island, beach, dune, desert, oasis,
        forest, jungle, meadow, field, vineyard, orchard, swamp, marsh, lake, pond, river, stream, waterfall, geyser, ocean,
        wave, bay, lagoon, coral reef, rainbow, cloud, thunderstorm, lightning bolt, tornado, sunset, sunrise, moon,
        galaxy, comet, planet, star, northern light, snowflake, icicle, boulder, footpath""",
    "plural_only": "clothes, tools, ruins, fireworks, mountains, clouds, waves, leaves, shadows, ripples, stairs, jewels",
    # ---- what it is like ------------------------------------------------------------------------------------------------
    "colour": """red, green, blue, yellow, orange, purple, pink, brown, black, white, gray, beige, turquoise, teal, cyan, magenta,
        crimson, scarlet, maroon, navy blue, sky blue, olive green, lime green, mint green, dark green, light blue, violet,
        indigo, lavender, lilac, cream, ivory, golden, silver, bronze, copper, rust colored, peach colored, multicolored,
        pale pink, bright yellow, deep red, neon green, pastel, black and white""",
    "size": """small, big, large, tiny, huge, giant, enormous, little, miniature, tall, short, long, wide, narrow, thick, thin,
        slender, massive, medium sized, life sized""",
    "material": """wooden, metal, plastic, glass, paper, cardboard, leather, ceramic, porcelain, clay, stone, marble, granite,
        concrete, brick, steel, iron, brass, copper, tin, aluminum, chrome, rubber, felt, cotton, woolen, knitted, crocheted,
        silk, velvet, denim, linen, straw, wicker, bamboo, wax, ice, crystal, plush, origami, lego, chocolate, sandstone,
        terracotta, mosaic""",
    "pattern": """striped, spotted, dotted, checkered, plaid, floral, plain, patterned, embroidered, painted, engraved, carved,
        shiny, matte, glossy, transparent, translucent, glittering, rusty, dusty, muddy, wet, cracked, polished, rough, smooth,
        fuzzy, fluffy, furry, spiky, wrinkled, curved, twisted, folded, round, square, oval, triangular, hexagonal, symmetrical,
        glowing, reflective, weathered, faded""",
    "quality": """old, new, ancient, modern, vintage, antique, broken, empty, full, open, closed, clean, dirty, beautiful, ugly,
        cute, elegant, fancy, simple, cheap, expensive, rare, ordinary, strange, mysterious, magical, heavy, light, fragile,
        sturdy, handmade, homemade, abandoned, forgotten, futuristic, medieval, traditional, colorful, decorated, unusual,
        famous, favorite, perfect, half finished, upside down""",
    "mood": """happy, sad, angry, tired, sleepy, surprised, scared, proud, shy, curious, calm, excited, bored, lonely, friendly,
        brave, grumpy, serious, cheerful, nervous, playful, lazy, hungry, wise, young, elderly, middle aged, strong, skinny,
        chubby, graceful, clumsy, smiling, laughing, crying, frowning, wild, gentle, fierce, majestic""",
    "taste": """fresh, ripe, sweet, sour, spicy, salty, bitter, juicy, crispy, crunchy, creamy, hot, steaming, cold, frozen,
        grilled, fried, baked, roasted, boiled, raw, sliced, peeled, rotten, half eaten, delicious, organic, glazed,
        sugar coated, burnt""",
    "landscape": """green, rocky, snowy, sandy, misty, foggy, sunny, windy, stormy, frozen, dry, lush, barren, steep, endless,
        distant, quiet, peaceful, remote, deep, shallow, crystal clear, dramatic, rugged, overgrown, untouched, blooming,
        moonlit""",
    "number": "two, three, four, five, six, seven, eight, nine, ten, a dozen, a hundred, several, many, a few, a pair of, countless",
    "group": "group, row, pile, stack, collection, pair, herd, crowd, circle, line, set, bunch, family, handful",
    # ---- what happens ---------------------------------------------------------------------------------------------------
    "doing": """standing, sitting, lying down, kneeling, leaning back, walking, running, jumping, climbing, crawling, dancing,
        swimming, diving, sleeping, resting, yawning, stretching, waiting, hiding, looking up, looking at the camera,
        looking away, staring into the distance, turning around, falling, floating, spinning, eating, drinking, chewing,
        playing, fighting, hugging, shaking, listening, singing, shouting, whispering, smiling, laughing, crying, dreaming""",
    "human_doing": """reading a book, writing a letter, painting a picture, taking a photo, playing the guitar,
        playing chess, cooking dinner, baking bread, washing the dishes, cleaning the floor, ironing a shirt, sewing a button,
        knitting a sweater, fixing a bicycle, riding a horse, riding a bike, driving a car, rowing a boat, flying a kite,
        throwing a ball, catching a fish, chopping wood, digging a hole, watering the flowers, picking apples, feeding the birds,
        walking the dog, carrying a heavy bag, opening a door, pushing a cart, pulling a rope, holding a baby, holding an umbrella,
        talking on the phone, typing on a laptop, watching television, giving a speech, shaking hands, blowing out candles,
        brushing teeth, putting on makeup, combing hair, tying shoelaces, lifting weights, doing yoga, juggling, waving goodbye,
        building a snowman, lighting a fire, pouring a drink, buying vegetables, counting money, repairing a clock,
        counting stars, telling a story, wearing a mask""",
    "animal_doing": """wagging its tail, chasing a ball, hunting for food, drinking from a puddle, chewing on a bone,
        licking its paw, showing its teeth, spreading its wings, building a nest, digging in the ground, guarding its young,
        grazing, barking, howling, roaring, growling, sniffing the air, swinging from a branch, crossing a road,
        sleeping in the sun, curled up, peeking out of a hole, perched on a branch, hanging upside down, splashing in the water,
        carrying a stick, wearing a hat, wearing a sweater, balancing on a rope, catching an insect""",
    "vehicle_doing": """parked, driving fast, speeding along, turning a corner, stuck in traffic, stuck in the mud, broken down,
        crashing, being repaired, being loaded, arriving, departing, passing by, leaving a trail of smoke, covered in snow,
        covered in flowers, waiting at a red light, racing, on fire, seen from behind""",
    "state": """on display, on sale, for rent, under construction, half hidden, covered in dust, covered in snow, covered in moss,
        wrapped in paper, tied with a ribbon, full of water, full of flowers, filled with sand, casting a long shadow,
        reflected in a mirror, lit from below, lit by candles, seen through a window, hanging from the ceiling, in pieces,
        melting, burning, floating in the air, made of clouds, cut in half, isolated, surrounded by people, with a cracked surface,
        with intricate details, with a handle, with a label, with four legs, with two wheels""",
    "clothing": """hat, straw hat, baseball cap, helmet, crown, scarf, red dress, wedding dress, suit, black suit, tuxedo, uniform,
        raincoat, leather jacket, winter coat, hooded cloak, kimono, apron, swimsuit, wool sweater, striped shirt, t-shirt,
        pair of jeans, long skirt, bow tie, backpack, pair of glasses, pair of sunglasses, mask, necklace, space suit,
        suit of armor, costume, gold ring, pair of boots""",
    "hair": """long hair, short hair, curly hair, blond hair, red hair, dark hair, gray hair, a long beard, a mustache, a ponytail,
        braids, freckles, blue eyes, green eyes, brown eyes, tattoos, a shaved head, a wide smile, wrinkles, rosy cheeks,
        face paint""",
    # ---- where and when ---------------------------------------------------------------------------------------------------
    "place": """on a table, on a wooden table, on a chair, on a shelf, on the floor, on a rug, on a bed, on a windowsill, on a plate,
        on a tray, on a pedestal, on a white background, on a black background, on a bench, on a roof, on a wall, on a stage,
        on a street, on a sidewalk, on a road, on a highway, on a bridge, on a train, on a boat, on the beach, on the grass,
        on a hill, on a rock, on a branch, on an island, on the moon, on mars, on a farm, on a playground, in a room,
        in a kitchen, in a bathroom, in a bedroom, in a living room, in an office, in a classroom, in a library, in a museum,
        in a garage, in a basement, in an attic, in a hallway, in a church, in a castle, in a cave, in a shop, in a market,
        in a restaurant, in a hospital, in an elevator, in a box, in a basket, in a cage, in a nest, in a tent, in a garden,
        in a park, in a forest, in a jungle, in a field, in a meadow, in the desert, in the mountains, in the snow, in the rain,
        in the water, in a lake, in a river, in the ocean, in the sky, in space, in the city, in a village, in an alley,
        in a parking lot, in a swimming pool, in a bathtub, in the mud, in the sand, in the shade, at the beach, at the zoo,
        at the airport, at school, at work, at home, at a party, at a wedding, at a concert, at a bus stop, at a desk,
        at a crossroads, by the sea, by a river, by the fireplace, by the window, near a lake, near a fence, near a volcano,
        under a tree, under a bridge, under the bed, under water, under a blanket, under the stars, above the clouds,
        behind a fence, behind a curtain, behind glass, in front of a house, in front of a mirror, in front of a mountain,
        in front of the eiffel tower, next to a door, next to a pond, next to a lamp, beside a road, between two trees,
        between tall buildings, among flowers, among fallen leaves, inside a bottle, inside a spaceship, outside a shop,
        outside a cabin, along the coast, across the street, around a campfire, against a brick wall, against a blue sky,
        over the city, over a waterfall, through a tunnel, through a keyhole, down the stairs, up a ladder, at the top of a hill,
        at the edge of a cliff, in the middle of nowhere, in the background, in the corner""",
    "region": """paris, london, rome, tokyo, new york, venice, berlin, cairo, moscow, sydney, istanbul, india, china, japan, africa,
        iceland, norway, mexico, brazil, canada, italy, greece, spain, egypt, hawaii, california, the alps, the arctic,
        the himalayas, the sahara""",
    "time": """in the morning, at dawn, at sunrise, at noon, in the afternoon, in the evening, at sunset, at dusk, at night,
        at midnight, in spring, in summer, in autumn, in winter, on a sunny day, on a rainy day, on a cloudy day, on a foggy morning,
        on a cold night, during a storm, during the golden hour, during an eclipse, after the rain, before the show,
        on a monday, on christmas eve, at halloween, on a birthday, in the 1920s, in the 1980s, in the middle ages, in the future,
        a long time ago, all day long, for the first time""",
    "weather": """heavy rain, light snow, thick fog, strong wind, bright sunlight, soft light, harsh shadows, dark clouds,
        a clear blue sky, a starry sky, a full moon, a rainbow, lightning, mist, falling leaves, cherry blossoms, smoke, steam,
        dust, floating lanterns, neon lights, candlelight""",
    # ---- how it is shown ----------------------------------------------------------------------------------------------------
    "medium": """photo, photograph, picture, image, snapshot, painting, oil painting, watercolor, acrylic painting, drawing,
        pencil drawing, charcoal drawing, ink drawing, chalk drawing, sketch, doodle, illustration, cartoon, comic, anime,
        poster, postcard, stamp, sticker, logo, icon, emblem, collage, print, woodcut, etching, engraving, mural, fresco, graffiti,
        tapestry, stained glass window, mosaic, sculpture, statue, figurine, 3d render, digital artwork, pixel art, vector graphic,
        concept art, diagram, blueprint, album cover, book cover, magazine cover, tattoo, wallpaper, screenshot, polaroid,
        x-ray, hologram, silhouette, rendering, portrait, still life, storyboard, children's drawing""",
    "manner": """in the style of impressionism, in the style of cubism, in the style of a comic book, in the style of van gogh,
        in the style of picasso, in the style of monet, in the style of pop art, in art nouveau style, in a minimalist style,
        in a realistic style, in a surreal style, in gothic style, in steampunk style, in cyberpunk style, in baroque style,
        in soft pastel colors, in bold colors, in black and white, in sepia tones, in shades of blue, with thick brush strokes,
        with clean lines, with fine details, with a limited palette, with dramatic lighting, with a blurred background,
        with a vintage look, with high contrast""",
    "framing": """close up, extreme close up, wide angle shot, wide shot, full body shot, half body portrait, side view, front view,
        back view, top view, aerial view, bird's eye view, low angle shot, high angle shot, macro shot, panoramic view,
        cropped view, over the shoulder shot, profile view, cutaway view, selfie, time lapse, long exposure, double exposure,
        fisheye view, candid shot, group shot, product shot, centered composition""",
    "tag": """high quality, low quality, highly detailed, sharp focus, out of focus, blurry, grainy, bright, dark, soft lighting,
        studio lighting, natural light, backlit, rim light, golden hour, high resolution, 4k, 8k, 35mm film, 50mm lens, bokeh,
        depth of field, motion blur, black and white, monochrome, sepia, vivid colors, muted colors, pastel colors, minimalist,
        surreal, abstract, realistic, photorealistic, cinematic, dramatic, whimsical, moody, peaceful, cozy, spooky, epic, elegant,
        retro, futuristic, rustic, hand drawn, flat design, isometric, line art, white background, plain background,
        blue background, wooden background, no people, nobody, copy space, award winning, trending, masterpiece, simple, cute,
        isolated, symmetrical, unfinished""",
    "judgement": """good, bad, nice, great, weird, funny, famous, detailed, blurry, cropped, bright, dark, low resolution, old, simple,
        beautiful, professional, amateur, rare, stunning, close up, black and white""",
    "relation": """next to, beside, near, behind, in front of, on top of, under, above, below, inside, outside, across from,
        between, leaning on, facing, surrounded by, looking at, attached to, far away from, bigger than, as small as,
        to the left of, to the right of, opposite""",
    "link": "while, as, and, but, because, where, until, although, so that, just before, right after, whenever",
    "event": """the sun is setting, the rain keeps falling, the wind is blowing, snow covers the ground, music is playing,
        the crowd is cheering, nobody is watching, the lights go out, the train is leaving, the door is open, dinner is ready,
        the clock strikes twelve, birds are singing, the city is asleep, the fire is burning, everyone is laughing,
        the waves are crashing, it is getting dark, the water is frozen, the shop is closed, the river is rising,
        winter is coming, a storm is near, the party begins, the bell is ringing, the game is over, children are playing,
        the leaves turn yellow, something strange happens, time stands still""",
    "abstract": """love, freedom, loneliness, hope, fear, joy, silence, chaos, balance, memory, childhood, friendship, power, peace,
        war, time, music, science, technology, travel, business, health, education, sport, fashion, history, science fiction,
        fantasy, winter, home""",
}

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

IRREGULAR_PLURALS = {
    "man": "men", "woman": "women", "child": "children", "mouse": "mice", "goose": "geese", "calf": "calves",
    "knife": "knives", "leaf": "leaves", "elf": "elves", "wolf": "wolves", "bookshelf": "bookshelves", "dice": "dice",
    "sheep": "sheep", "deer": "deer", "moose": "moose", "bison": "bison", "salmon": "salmon", "trout": "trout",
    "shrimp": "shrimp", "squid": "squid", "goldfish": "goldfish", "jellyfish": "jellyfish", "starfish": "starfish",
    "headphones": "headphones", "sunglasses": "sunglasses", "scissors": "scissors", "samurai": "samurai", "moss": "mosses",
    "tomato": "tomatoes", "potato": "potatoes", "mango": "mangoes", "volcano": "volcanoes", "tornado": "tornadoes",
    "buffalo": "buffaloes", "spaceship": "spaceships", "fisherman": "fishermen", "businessman": "businessmen",
}  # fmt: skip

_SYMBOL = re.compile(r"\{(\w+)(:many)?\}")
# "a" and "an" both become "an" before a vowel sound: "uni…", "eu…", "one" and the like start with a consonant's sound.
_ARTICLE = re.compile(r"\ban? (?=(\w))(?=(uni|eu|one|use|ukulele)?)")


def plural(noun: str) -> str:
    """The plural of a noun or of a noun phrase's last word: "toy train" -> "toy trains", "cherry" -> "cherries"."""
    head, space, word = noun.rpartition(" ")
    if word in IRREGULAR_PLURALS:
        word = IRREGULAR_PLURALS[word]
    elif word.endswith("y") and word[-2:-1] not in "aeiou":
        word = word[:-1] + "ies"
    elif word.endswith(("s", "x", "z", "ch", "sh")):
        word += "es"
    else:
        word += "s"
    return head + space + word


def _article(match: re.Match) -> str:
    return "an " if match[1].lower() in "aeiou" and not match[2] else "a "


def _compile() -> dict[str, tuple[tuple[str, ...], ...]]:
    """Both tables as symbol -> templates, each template split into literal text and symbols by `_SYMBOL`.

    A split template is (text, name, ":many" or "", text, name, …, text).
    """
    choices = {name: [" ".join(word.split()) for word in words.split(",")] for name, words in WORDS.items()}
    choices |= {name: [line.strip() for line in lines.strip().splitlines()] for name, lines in RULES.items()}
    return {
        name: tuple(tuple(part or "" for part in _SYMBOL.split(template)) for template in templates)
        for name, templates in choices.items()
    }


def _expand(grammar: dict, symbol: str, rng: random.Random) -> str:
    # random() is the one generator method whose sequence Python guarantees across versions; choice() is not.
    templates = grammar[symbol]
    parts = templates[int(rng.random() * len(templates))]
    text = [parts[0]]
    for at in range(1, len(parts), 3):
        word = _expand(grammar, parts[at], rng)
        text.append(plural(word) if parts[at + 1] else word)
        text.append(parts[at + 2])
    return "".join(text)


def everyday_captions(count: int = EVERYDAY_COUNT, seed: int = 0) -> Iterator[str]:
    """`count` distinct English captions from the built-in grammar, always the same ones for a seed.

    The first n captions do not depend on `count`. 1 to 44 words, 10 on average, in lower case; the first 20,000 use 2,400
    words and at most 48 of CLIP's 77 tokens. Far more than 10⁹ captions exist, so `count` has no practical limit.
    Raises ValueError for count < 1.
    """
    if count < 1:
        raise ValueError(f"everyday_captions: count must be at least 1, not {count}")
    return _everyday_captions(count, seed)


def _everyday_captions(count: int, seed: int) -> Iterator[str]:
    grammar, rng, seen = _compile(), random.Random(seed), set()
    while len(seen) < count:
        caption = _ARTICLE.sub(_article, _expand(grammar, "caption", rng))
        if caption not in seen:
            seen.add(caption)
            yield caption


def everyday_source(count: int = EVERYDAY_COUNT, seed: int = 0) -> str:
    """The name under which a covariance of these captions is stored, such as "everyday-20000-seed0".

    Stored files are found by it. A change to the grammar changes the captions: give the new ones a new name here.
    """
    return f"everyday-{count}-seed{seed}"


def read_captions(path: str | Path) -> Iterator[str]:
    """The captions of a file, one after the other, never the whole file in memory.

    path: `.txt`, one caption per line; `.jsonl`, one object per line with "text" or "caption"; `.csv` with a header that
    names a column "caption" or "text". UTF-8 (a byte order mark is fine). Empty lines and empty captions are passed over.
    Raises FileNotFoundError, and ValueError with the file and line for another file type, text that is not UTF-8, a line
    that does not parse, a missing column, or a file without any caption. Errors inside the file appear while iterating.
    """
    path = Path(path)
    readers = {".txt": _text_lines, ".jsonl": _json_lines, ".csv": _csv_rows}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path} is not one of {', '.join(readers)}")
    if not path.is_file():
        raise FileNotFoundError(f"no such file of captions: {path}")
    return _captions_of(path, readers[path.suffix.lower()])


def _captions_of(path: Path, reader) -> Iterator[str]:
    empty = True
    with path.open("rb") as file:
        for caption in reader(path, _decoded(path, file)):
            if caption := " ".join(caption.split()):
                empty = False
                yield caption
    if empty:
        raise ValueError(f"{path} holds no caption")


def _decoded(path: Path, file) -> Iterator[str]:
    """Lines with their ends. Decoding line by line is what lets an error name its line."""
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            at = f"byte {error.start + 1} of the line is 0x{line[error.start]:02x}"
            raise ValueError(f"{path}, line {number} is not UTF-8 text ({at}); save it as UTF-8") from error


def _text_lines(path: Path, lines: Iterator[str]) -> Iterator[str]:
    return lines


def _json_lines(path: Path, lines: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        caption = row.get("text", row.get("caption")) if isinstance(row, dict) else None
        if not isinstance(caption, str):
            raise ValueError(f'{path}, line {number} has no string under "text" or "caption"')
        yield caption


def _csv_rows(path: Path, lines: Iterator[str]) -> Iterator[str]:
    rows = csv.DictReader(lines, strict=True)
    try:
        columns = {(name or "").strip().lower(): name for name in rows.fieldnames or ()}
        column = columns.get("caption", columns.get("text"))
        if column is None:
            raise ValueError(f'{path} has no column "caption" or "text", only {sorted(columns)}')
        for row in rows:
            yield row[column] or ""
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}") from error
