"""The plots of the tiny stories. `generator.py` turns them into text.

A plot is a list of beats, one per line. Some lines are special:

    | text    another wording of the beat above
    -         an empty wording, which omits the beat
    @name     a beat from `BEATS`, which plots share

Lines contain slots and marks:

    {A}, {B}                              the two people
    {G}                                   the grown-up of A
    {toy}, {place}, ...                   a word, drawn once per story
    {a toy}                               the word with its article
    {at}                                  the preposition of the place
    {A.he}, {A.him}, {A.his}, {toy.it}    a pronoun, or the name if a pronoun is ambiguous
    {they}                                a plural pronoun for A and B
    {A.child}                             "girl" or "boy"
    [cause: rain], [effect: wet]          a cause, and the effect of the last cause
"""

BEATS = {
    "alone": """
Once upon a time, there was {a trait} {A.child} named {A}.
| {A} was {a trait} {A.child}.
| There once was {a trait} {A.child} named {A}.
| {A} was {a trait} {A.child} who lived with {A.his} {G}.
| In a little house near the {place} lived {a trait} {A.child} named {A}.
""",
    "pair": """
Once upon a time, there were two friends named {A} and {B}.
| {A} and {B} were best friends.
| {A} lived next to {B}. {they} played together every day.
| {A} and {B} liked to play together.
| There once was {a trait} {A.child} named {A}. {A.he} had a friend named {B}.
""",
    "going": """
One {day} day, {A} went to the {place}.
| One {time}, {A.he} walked to the {place}.
| {A.his} {G} took {A.him} to the {place}.
| It was {a day} day, so {A} went to the {place}.
| One {time}, {A} and {A.his} {G} went to the {place}.
""",
    "going_both": """
One {day} day, {they} went to the {place}.
| {they} walked to the {place} together.
| One {time}, {A} and {B} ran to the {place}.
| It was {a day} day, and {A} met {B} {at} the {place}.
""",
    "sky": """
The sun was shining and the birds were singing.
| The sky was blue and the grass was green.
| -
| -
| -
""",
    "home": """
{A} smiled all the way home.
| That night, {A} told {A.his} {G} all about it.
| {A} went home and gave {A.his} {G} a big hug.
| It was the best day ever.
| Then {A.he} went home and had {a food}.
| {A} slept very well that night.
| -
""",
    "friends": """
From that day on, {A} and {B} were best friends.
| {they} played together until the sun went down.
| {they} laughed and went home together.
| {A} and {B} held hands and walked home.
| After that, {A} and {B} always helped each other.
| {they} had a lot of fun that day.
| -
""",
    "thanked": """
"Thank you, {B}!" {A} said.
| {A} hugged {B} and said, "Thank you so much!"
| "You are a good friend," {A} said to {B}.
| -
""",
    "thanks": """
"Thank you, {A}!" {B} said with a big smile.
| {B} hugged {A} and said, "Thank you so much!"
| "You are a good friend," said {B}.
| {B} thanked {A} and gave {A.him} {a food}.
""",
}

PLOTS = {
    "lost": """
@alone
{A} had {a size} {color} {toy}.
| {A.he} loved {A.his} {color} {toy} very much.
| {A.his} best toy was {a color} {toy}.
| {A.his} {G} gave {A.him} {a color} {toy}.
@going
But when {A.he} looked in {A.his} bag, the {toy} was [cause: gone].
| {A.he} played and played, but then {A.he} [cause: lost] {A.his} {toy}.
| After some time, {A.he} saw that the {toy} was [cause: missing].
| {A} ran fast and [cause: dropped] {A.his} {toy} in the tall grass.
{A.he} felt very [effect: sad].
| {A.he} was so [effect: sad] that {A.he} began to cry.
| {A} was [effect: upset] and sat down on a big rock.
| "Where is my {toy}?" {A.he} cried. {A.he} was very [effect: sad].
{B} saw {A} and asked, "What is wrong?"
| Then {B} came by. "I can help you," {B.he} said.
| {B} heard {A} and ran to help {A.him}.
| {A.his} friend {B} wanted to help.
{they} looked under the trees and behind the rocks.
| {they} looked here and there.
| {they} looked up and down and all around.
| -
At last, {B} [cause: found] the {toy} under a bush.
| Soon {B} saw something {color}. {B.he} had [cause: found] the {toy}!
| {A} looked one more time and [cause: found] {toy.it} near a tree.
{A} was very [effect: happy].
| {A} was [effect: glad] and jumped up and down.
| {A} felt [effect: happy] again and held the {toy} tight.
@thanked
@friends
""",
    "rain": """
@alone
@going
@sky
{A} was playing with {A.his} {toy} when it started to [cause: rain].
| Dark clouds came, and then the [cause: rain] fell down.
| Suddenly it began to [cause: rain] very hard.
| Then a big [cause: storm] came.
Soon {A.his} clothes were [effect: wet].
| {A.he} had no coat and got all [effect: wet].
| {A.he} ran to a tree, but {A.his} hair was already [effect: wet].
| {A.his} shoes and socks got [effect: wet].
{A} ran home as fast as {A.he} could.
| {A.he} hurried back to the house.
| {A.his} {G} called, "Come inside, {A}!"
{A.his} {G} gave {A.him} a towel and [cause: hot] soup.
| {A.his} {G} made [cause: hot] tea and gave {A.him} a big blanket.
| {A.he} sat by the [cause: fire] with {A.his} {G}.
Soon {A} was [effect: warm] and dry.
| Now {A} felt [effect: warm] and happy.
| {A} was [effect: warm] again. "I like the rain, but I like home more," {A.he} said.
@home
""",
    "share": """
@pair
@going_both
{A} had {a size} {food}, but {B} had [cause: nothing] to eat.
| {A} sat down to eat {A.his} {food}. {B} had [cause: forgotten] {B.his} lunch.
| {A.his} {G} gave {A.him} {a food}, but {B} [cause: did not get] one.
{B} felt [effect: hungry].
| {B} looked at the {food}. {B.he} was very [effect: hungry].
| "I am so [effect: hungry]," said {B}.
{A} thought about it for a moment.
| {A} looked at {B} and smiled.
| "Do not worry, {B}," said {A}.
| -
So {A} [cause: shared] {A.his} {food} with {B}.
| {A} cut the {food} in two and [cause: gave] one half to {B}.
| "We can [cause: share]!" {A} said, and gave {B.him} a piece.
{B} was very [effect: happy].
| {B} ate it all up. {B.he} was [effect: happy] now.
| Now {B} was [effect: full] and had a big smile.
@thanks
@friends
""",
    "pet": """
@alone
@going
There {A.he} saw {a size} {animal}.
| {A.he} heard a sound behind a tree. It was {a color} {animal}.
| {A} found {a size} {animal} {at} the {place}.
The {animal} had [cause: no food], and it looked [effect: hungry].
| The {animal} was [cause: alone], so it was [effect: sad].
| The {animal} had [cause: hurt] its leg and looked [effect: sad].
"Hello, little {animal}," said {A}. "Do not be afraid."
| {A.he} sat down and spoke to {animal.it} in a soft voice.
| {A} wanted to help {animal.it}.
{A} [cause: gave] {animal.it} some of {A.his} {food}.
| {A.he} took {a food} out of {A.his} bag and [cause: fed] the {animal}.
| {A} [cause: hugged] the {animal} and gave {animal.it} some water.
The {animal} was [effect: happy] and made a funny sound.
| Soon the {animal} felt [effect: better] and began to play.
| The {animal} was not afraid now. It was [effect: happy].
"Can I keep {animal.it}?" {A} asked {A.his} {G}. "Yes, you can," said {A.his} {G}.
| {A} and the {animal} became good friends.
| Every day, {A} came back to play with the {animal}.
| The {animal} followed {A.him} all the way home.
@home
""",
    "fall": """
@pair
@going_both
"Let us run!" said {A}.
| {they} wanted to see who was the fastest.
| {A} and {B} ran up and down.
| {A} climbed up a tall tree.
But {A} did not look, and {A.he} [cause: fell] down.
| Then {A} [cause: slipped] on a wet stone.
| {A} ran too fast and [cause: tripped] over {a toy}.
{A.his} knee [effect: hurt] and {A.he} started to cry.
| "Ouch!" {A} cried. {A.his} leg [effect: hurt].
| {A.he} [effect: cried] because {A.his} arm hurt.
{B} ran over and [cause: helped] {A} to get up.
| {B} sat next to {A} and [cause: hugged] {A.him}.
| "I will help you," said {B}, and {B.he} [cause: kissed] the sore spot.
Soon {A} felt [effect: better].
| After a while, {A} was [effect: fine] and could play again.
| {A} dried {A.his} tears. {A.he} felt [effect: better] now.
"I will be more careful," said {A}.
| "Next time, I will walk," {A.he} said.
| -
@friends
""",
    "gift": """
@alone
Today was {A.his} birthday.
| It was a special day. {A} was four years old!
| {A.he} woke up early, because it was {A.his} birthday.
{B} came to {A.his} house with a box.
| {A.his} friend {B} came to the party.
| There was a knock on the door. It was {B}.
"This [cause: present] is for you, {A}," said {B}.
| {B} [cause: gave] {A} a present.
| "Open it!" {B} said, and gave {A.him} a [cause: gift].
Inside there was {a size} {color} {toy}.
| {A} opened the box and saw {a color} {toy}.
| It was {a color} {toy}! {A} had always wanted one.
{A} was so [effect: happy] that {A.he} danced.
| {A.he} was very [effect: excited] and showed {toy.it} to {A.his} {G}.
| {A} felt [effect: happy] and hugged {B}.
Then {they} ate {food} and sang songs.
| {they} played with the {toy} all day long.
| Then {they} went to the {place} to play with {toy.it}.
@friends
""",
    "dark": """
@alone
One night, {A} was in bed. The room was very [cause: dark].
| It was time to sleep, but {A} heard a strange [cause: noise].
| The [cause: wind] was loud outside, and {A} could not sleep.
{A.he} was [effect: scared].
| {A} felt [effect: afraid] and hid under the blanket.
| {A.he} was [effect: scared] and called for {A.his} {G}.
{A.his} {G} came in and turned on the [cause: light].
| Then {A.he} turned on the [cause: lamp] and looked around.
| {A.his} {G} sat on the bed and [cause: sang] a song.
It was only {a animal} at the window!
| It was just {A.his} {toy} on the floor.
| There was nothing there but {A.his} {color} {toy}.
Now {A} was not scared. {A.he} felt [effect: safe].
| {A} laughed and felt [effect: brave].
| {A} felt [effect: safe] and closed {A.his} eyes.
"Good night, {A}," said {A.his} {G}.
| Soon {A} was asleep and dreamed of {a color} {animal}.
| {A} held {A.his} {toy} and went to sleep.
""",
    "kite": """
@pair
@going_both
{A} had {a size} {color} kite. {they} made it fly very high.
| {they} played with {a color} ball.
| {A} showed {B} {A.his} new {color} balloon.
But the [cause: wind] was too strong, and it got [effect: stuck] in a tree.
| Then a big [cause: wind] came and it flew [effect: away] into a tall tree.
| It went too [cause: high] and got [effect: stuck] on a roof.
"Oh no!" said {A}. {A.he} could not reach it.
| {A} jumped and jumped, but {A.he} was too small.
| {B} tried to get it, but {B.he} could not.
Then {a trait} {animal} came and [cause: helped] {A.him}.
| {B} got a long stick and [cause: pulled] it down.
| {A.his} {G} brought a ladder and [cause: got] it back.
{A} was [effect: glad] to have it back.
| {A} and {B} were [effect: happy] and clapped their hands.
| {A} was very [effect: happy]. "Thank you!" {A.he} said.
@friends
""",
    "seed": """
@alone
One {time}, {A.his} {G} gave {A.him} a tiny seed.
| {A} found a small seed {at} the {place}.
| {A} had a seed, and {A.he} wanted to grow a flower.
{A.he} put the seed in the ground.
| {A} dug a hole and put the seed inside.
| {A.he} planted the seed near the {place}.
Every day, {A} gave it [cause: water].
| {A} [cause: watered] the seed every morning.
| The [cause: sun] was warm, and {A} gave it a little water.
{A.he} waited and waited.
| "When will it grow?" {A.he} asked {A.his} {G}. "Be patient," said {A.his} {G}.
| It took a long time.
Then one day, {a color} flower [effect: grew].
| At last, a big {color} flower [effect: opened].
| Soon it [effect: grew] as tall as {A}.
{A} was very [effect: proud].
| {A} felt [effect: proud] and showed it to {B}.
| "Look what I made!" said {A}. {A.he} was so [effect: proud].
@home
""",
    "quarrel": """
@pair
One day, {they} found {a size} {toy} {at} the {place}.
| {at} the {place}, {they} saw {a color} {toy}.
| {A.his} {G} gave {them} {a color} {toy}.
Both {A} and {B} [cause: wanted] to play with {toy.it}.
| "It is mine!" said {A}. "No, it is mine!" [cause: shouted] {B}.
| {A} [cause: took] the {toy} away from {B}.
{B} was [effect: angry].
| {they} were both [effect: angry] and did not talk.
| {B} felt very [effect: angry] and turned away.
Then {A} said, "I am [cause: sorry]. We can take turns."
| After a while, {A} said that {A.he} was [cause: sorry].
| {A} thought about it and [cause: gave] the {toy} back.
{B} smiled. {B.he} was [effect: happy] again.
| {B} was not angry now. {B.he} felt [effect: better].
| So {they} took turns, and both were [effect: happy].
@friends
""",
    "mud": """
@alone
@going
{A} saw a big puddle of [cause: mud] and jumped in.
| {A.he} played in the [cause: mud] with {a animal}.
| {a animal} ran by and {A} fell into the [cause: mud].
Splash! Now {A.his} face was [effect: dirty].
| {A.he} was [effect: dirty] from head to toe.
| {A.his} clothes were all [effect: dirty], but {A} laughed.
When {A.he} came home, {A.his} {G} was surprised.
| "Oh, {A}!" said {A.his} {G}. "Look at you!"
| {A.his} {G} saw {A.him} and laughed.
{A.his} {G} gave {A.him} a warm [cause: bath].
| {A} had to take a [cause: bath] with lots of soap.
| {A.he} [cause: washed] {A.his} hands and {A.his} face.
Soon {A} was [effect: clean] again.
| After that, {A} was [effect: clean] and smelled nice.
| Now {A.he} was [effect: clean], and so were {A.his} clothes.
@home
""",
    "bake": """
@pair
{A} wanted to make {a treat} for {A.his} {G}.
| One {time}, {A} and {B} made {a size} {treat}.
| "Let us make {a treat}!" said {B}.
{they} put everything into a big bowl.
| {B} brought some milk, and {A} brought some sugar.
| {A} mixed and {B} sang a song.
But {they} [cause: forgot] about it, and the {treat} got [effect: burned].
| Then {a animal} came and [cause: ate] the {treat}. Now it was all [effect: gone].
| {they} used too much [cause: sugar], so the {treat} was very [effect: sweet].
| {A} put it in the [cause: oven], and soon the {treat} was [effect: hot].
"It is fine," said {B}. "We can make another one."
| {A} looked at {B}, and {they} both laughed.
| {A.his} {G} came in to look.
So {they} [cause: worked] hard, and in the end {they} were [effect: tired] but happy.
| {A.his} {G} [cause: liked] it very much, and {they} were [effect: proud].
| {they} [cause: ate] and ate until {they} were [effect: full].
@friends
""",
    "tired": """
@pair
@going_both
{they} ran and jumped and [cause: played] all day.
| {they} [cause: walked] a long, long way.
| {A} [cause: carried] {a size} {toy} all the way.
Then {A} was very [effect: tired].
| {A.his} legs were [effect: tired], and {A.he} sat down.
| "I am so [effect: tired]," said {A}.
{B} had {a food} in {B.his} bag. "Take this," {B.he} said.
| {B} told {A} a story about {a trait} {animal}.
| {they} sat under a tree and looked at the sky.
So {A} [cause: rested] for a while.
| {A} closed {A.his} eyes and [cause: slept] in the soft grass.
| {A} [cause: ate] and had some cool water.
When {A.he} got up, {A.he} felt [effect: strong] again.
| Soon {A.he} felt [effect: better].
| Now {A} was [effect: ready] to go home.
@friends
""",
    "hide": """
@pair
@going_both
{they} played hide and seek. {B} closed {B.his} eyes and counted to ten.
| "Let us hide and seek!" said {A}. {B} began to count.
{A} [cause: hid] behind a big tree.
| {A} [cause: hid] in {a size} box.
| {A} [cause: hid] under {a color} blanket.
{B} looked for {A.him}, but {A} was [effect: hidden] very well.
| {B} looked and looked, but {B.he} could not [effect: see] {A}.
Then {a animal} made a noise, and {A} [cause: laughed].
| {A color} feather touched {A.his} nose, and {A.he} [cause: sneezed].
| {A} [cause: moved] a little.
"I [effect: found] you!" said {B}.
| {B} heard it and [effect: found] {A.him}.
"Now it is my turn," said {A}.
| {they} both laughed, and then {they} changed places.
| -
@friends
""",
}
