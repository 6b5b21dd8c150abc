// Drawing a token for each row of a batch, the same on CPU and GPU: what is drawn from, and what each row remembers of its answer.
//
// The penalties of tokens drawn before are subtracted from the logits; the automaton (src/generation/automaton.py) says which
// tokens a row must not draw and which end it; the nucleus is cut at temperature 1, among its tokens top_k; what stays is raised to
// 1 / temperature, and a uniform number inverts its cumulative distribution in the order of tokens. Where tokens are alike at a
// border all of them stay. The likeliest token counts as 1 throughout, so that a low temperature can't turn all of them to zero.
#pragma once

#include "arguments.h"

namespace wkv {

enum Next { STOPS = -1, NEVER = -2, ENDS = -3 };                                     // as in automaton.py
enum Ended { GOES_ON = 0, BY_STOP = 1, BY_END_OF_TEXT = 2, BY_MAX_TOKENS = 3, NOT_FINITE = 4 };  // as in sampler.py

struct SampledRow {
    int distinct;  // tokens in the tables of counts
    int drawn;     // tokens drawn so far
    int state;     // of the automaton
    int ended;     // then it draws nothing more
};

struct Sample {
    float* logits;           // [rows, V], used up
    const short* next;       // [Q, V]
    const float* weight;     // [V], what drawing a token adds to its count
    const double* uniforms;  // [rows, C] in [0, 1), one for each token that a row may draw
    int* tokens;             // [rows, C], the distinct ones drawn before
    float* counts;           // [rows, C], how often, older times for less
    SampledRow* row;         // [rows]
    int* drawn;              // [2, rows]: tokens, and how each row has ended
    int rows, vocabulary, capacity, n_blank;
    float presence, frequency, decay, temperature;
    double top_p;
    int top_k;
};

// Whether a row that has this much left may draw a token with such a next state.
WKV_ANYWHERE inline bool may_be_drawn(int next, bool last, int n_blank) { return next != NEVER && !(last && next >= 0 && next < n_blank); }

// Enters a token drawn, but for its count; a negative one stands for logits that are not finite.
WKV_ANYWHERE inline void enter(const Sample& x, int row, int token) {
    SampledRow& now = x.row[row];
    const int next = token < 0 ? 0 : x.next[static_cast<long>(now.state) * x.vocabulary + token];
    now.drawn++;
    now.ended = token < 0 ? NOT_FINITE : next == ENDS ? BY_END_OF_TEXT : next == STOPS ? BY_STOP
                : now.drawn >= x.capacity ? BY_MAX_TOKENS : GOES_ON;
    now.state = next < 0 ? 0 : next;
    x.drawn[row] = token < 0 ? 0 : token;
    x.drawn[x.rows + row] = now.ended;
}

}  // namespace wkv
